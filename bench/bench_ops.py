"""Every op at the models' shapes (fastmimi/devtools/workloads.py), with each implementation that can run here.

pytest-benchmark times the implementation that the dispatcher chooses; the others are timed before each of its rounds.
All are checked first. The benchmark fails if another implementation is faster by more than timing noise explains: the
dispatcher's order must be that of speed.
"""

import pytest
import torch

from fastmimi.devtools.workloads import WORKLOADS
from fastmimi.errors import InputError
from fastmimi.runtime import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NOISE = 1.15  # ratios of times up to this are attributed to noise


def runs_here(op, candidate):
    try:
        dispatch.explain(DEVICE, DTYPE, {op: candidate})
    except InputError:
        return False
    return True


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload.op}: {workload}")
@torch.no_grad()  # not inference mode, in which weights are packed at every call
def bench_op(in_turn, benchmark, workload):
    [chosen] = [row.chosen for row in dispatch.explain(DEVICE, DTYPE) if row.op == workload.op]
    rows = workload.cpu_rows if DEVICE == "cpu" else workload.rows
    candidates = [name for name in dispatch.CANDIDATES if runs_here(workload.op, name)]
    with torch.device(DEVICE):
        for candidate in candidates:
            workload.check(candidate, DTYPE, rows)
        tensors = workload.tensors(DTYPE, rows)

    def call(candidate):
        inputs = workload.channels_first(tensors) if candidate == "reference" else tensors

        def once():
            workload.run(candidate, inputs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        once()  # packs weights
        return once

    name = f"{workload.op}: {workload}" + (f", {rows} rows" if rows < workload.rows else "")
    in_turn(name, {candidate: call(candidate) for candidate in candidates}, rounds=30, ours=chosen)
    ratios = benchmark.extra_info.get("ratios", {})  # none with --benchmark-disable
    faster = {name: round(ratio, 2) for name, ratio in ratios.items() if ratio * NOISE < 1}
    assert not faster, f"the dispatcher chooses {chosen}, but others take this fraction of its time: {faster}"
