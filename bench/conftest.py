"""What benchmarks share: inputs, checks before and after the clock, and the size that a CPU can take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmimi import dispatch, memory
from fastmimi.errors import InputError
from fastmimi.workloads import Workload

CPU_FLOPS = 2e9  # a round on a CPU: about 10 ms


@pytest.fixture
def benchmark(benchmark, monkeypatch):
    """pytest-benchmark's; red where a timed round packs weights or records a step, which is done only once."""
    prepared: list[int] = []
    pedantic = benchmark.pedantic

    def steady(target, *arguments, **options):
        def counted(*given, **named):
            before = memory.preparations()
            result = target(*given, **named)
            prepared.append(memory.preparations() - before)
            return result

        result = pedantic(counted, *arguments, **options)
        timed = prepared[-options["rounds"] :] if benchmark.enabled else []
        assert not any(timed), f"timed rounds packed weights or recorded steps, so many times each: {timed}"
        return result

    monkeypatch.setattr(benchmark, "pedantic", steady)
    return benchmark


@pytest.fixture
def time_op(benchmark) -> Callable[[Workload, str], None]:
    """Check a workload by a candidate of the dispatcher, then time it; a group is a workload."""

    @torch.no_grad()  # and not inference mode, whose tensors are packed at every call
    def run(workload: Workload, candidate: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        try:
            dispatch.explain(device, dtype, {workload.op: candidate})
        except InputError as error:
            pytest.skip(str(error))
        rows = workload.rows
        if device == "cpu":
            rows = max(16, min(rows, int(rows * CPU_FLOPS / workload.flops(rows)))) // 16 * 16
        benchmark.group = f"{workload.op}: {workload}" + (f", cut to {rows}" if rows < workload.rows else "")
        with torch.device(device):
            workload.check(candidate, dtype, rows)
            tensors = workload.tensors(dtype, rows)

        def once() -> None:
            workload.run(candidate, tensors)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=10, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter, config) -> None:
    """The ratios to the peers, which the table of pytest-benchmark has no column for."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info.get("ratios")]
    if rows:
        terminalreporter.section("times of the peers as multiples of ours, taken in turn")
    for bench in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in bench.extra_info["ratios"].items())
        terminalreporter.write_line(f"{bench.group:32} {bench.stats.median * 1e3:9.1f} ms   {ratios}")
