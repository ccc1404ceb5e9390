"""Every op at the models' shapes (fastmimi/devtools/workloads.py), by each implementation that can run here, in turn.

What the dispatcher chooses is timed by the benchmark, the others before each of its rounds; each is checked first. Red
where another is faster than the choice by more than a busy machine explains: then the order is not that of speed.
"""

import pytest
import torch

from fastmimi.devtools.workloads import WORKLOADS
from fastmimi.errors import InputError
from fastmimi.runtime import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NOISE = 1.15


def runs_here(op, candidate):
    try:
        dispatch.explain(DEVICE, DTYPE, {op: candidate})
    except InputError:
        return False
    return True


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload.op}: {workload}")
@torch.no_grad()  # and not inference mode, whose tensors are packed at every call
def bench_op(in_turn, benchmark, workload):
    [chosen] = [row.chosen for row in dispatch.explain(DEVICE, DTYPE) if row.op == workload.op]
    rows = workload.cpu_rows if DEVICE == "cpu" else workload.rows
    candidates = [name for name in dispatch.CANDIDATES if runs_here(workload.op, name)]
    with torch.device(DEVICE):
        for candidate in candidates:
            workload.check(candidate, DTYPE, rows)
        tensors = workload.tensors(DTYPE, rows)

    def call(candidate):
        def once():
            workload.run(candidate, tensors)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        once()  # packs weights
        return once

    name = f"{workload.op}: {workload}" + (f", {rows} rows" if rows < workload.rows else "")
    in_turn(name, {candidate: call(candidate) for candidate in candidates}, rounds=30, ours=chosen)
    ratios = benchmark.extra_info.get("ratios", {})  # none with --benchmark-disable
    slower_than = {name: round(ratio, 2) for name, ratio in ratios.items() if ratio * NOISE < 1}
    assert not slower_than, f"{chosen} is chosen, and others take less time, as shares of its own: {slower_than}"
