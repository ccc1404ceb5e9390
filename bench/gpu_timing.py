"""Timers of calls on a GPU, and a stand-in that runs the calls where there is none and gives no numbers.

Every method returns the columns of a row. `kernels` times many launches in a CUDA graph, so that time on the host does
not count. What cannot be captured is enqueued behind a kernel that waits, which hides the host as well.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_report import Row
from torch import Tensor

from fastmimi.runtime import packing

Call = Callable[[], Any]
CYCLES_PER_MS = 2_000_000  # at most: of the clock that `torch.cuda._sleep` counts
LAUNCHES = 64  # in a graph or behind a waiting kernel; the queue of a CUDA stream holds about 1,000
LONG_ENOUGH_MS = 50.0  # of a graph of long kernels
MOST_SETS = 64  # of rotated inputs
NOT_MEASURED: Row = {"measured": False}


class Timer:
    """Measures on the current GPU."""

    def kernels(self, calls: list[Call], repeats: int = 5) -> Row:
        """GPU time in ms of one call, without the host's: the median of `repeats` graphs through all calls."""
        for call in calls:
            call()  # compiles, packs
        torch.cuda.synchronize()
        all_ms = max(1e-3, timed(calls[0])) * len(calls)
        rounds = max(1, min(LAUNCHES // len(calls), int(LONG_ENOUGH_MS / all_ms)))
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # comes back to it if a capture fails
                play, how = captured(calls, rounds), "graph"
        except RuntimeError as error:
            torch.cuda.synchronize()
            play, how = None, f"queue, no graph: {error}"[:120]
        if play is None:
            times = [behind_a_wait(calls) / len(calls) for _ in range(repeats)]
            return {"ms": statistics.median(times), "timed_by": how, "measured": True}
        play()
        times = [timed(play) / (rounds * len(calls)) for _ in range(repeats)]
        return {"ms": statistics.median(times), "ms_spread": max(times) - min(times), "timed_by": how, "measured": True}

    def whole(self, call: Call, repeats: int = 7) -> Row:
        """Wall clock and GPU time of long calls in ms: medians."""
        call()
        call()
        walls, spans = [], []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            spans.append(timed(call))
            walls.append((time.perf_counter() - start) * 1e3)
        return {
            "wall_ms": statistics.median(walls), "gpu_ms": statistics.median(spans),
            "wall_ms_spread": max(walls) - min(walls), "measured": True,
        }  # fmt: skip

    def frames(self, call: Call, repeats: int = 300, seconds: float = 4.0) -> Row:
        """Of a short call: wall clock with a synchronisation after it (p50, p99), and GPU time behind a wait."""
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        walls, until = [], time.monotonic() + seconds
        while len(walls) < repeats and (len(walls) < 20 or time.monotonic() < until):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1e3)
        walls.sort()
        spans = [behind_a_wait([call]) for _ in range(7)]
        return {
            "wall_ms_p50": statistics.median(walls), "wall_ms_p99": walls[min(len(walls) - 1, len(walls) * 99 // 100)],
            "gpu_ms": statistics.median(spans), "frames": len(walls), "measured": True,
        }  # fmt: skip

    def memory(self, call: Call) -> Row:
        """MiB that are allocated before a call, and at most during it."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return {"resident_mib": before / 2**20, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}

    def launches(self, call: Call, top: int = 0) -> Row:
        """Kernels that a call launches, synchronisations, and the `top` kernels by GPU time."""
        call()
        row: Row = {"synchronisations": synchronisations(call)}
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            call()
            torch.cuda.synchronize()
        kernels: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem"):
                kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
        row |= {"launches": sum(map(len, kernels.values())), "kernels_ms": sum(map(sum, kernels.values()))}
        if top:
            ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:top]
            row["top"] = [{"kernel": n[:80], "launches": len(t), "ms": sum(t)} for n, t in ordered]
        return row

    def ceilings(self) -> dict[str, float]:
        """Measured peak rates: bytes/s of a copy (read + written), FLOP/s of matrix products in bf16 and TF32."""
        pair = [torch.empty(2**29, device="cuda", dtype=torch.float32) for _ in range(2)]
        ms = self.kernels([lambda a=pair[0], b=pair[1]: a.copy_(b)])["ms"]
        rates = {"copy_bytes_s": 2 * pair[0].nbytes / ms * 1e3}
        del pair
        for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
            a, b, y = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(3))
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            ms = self.kernels([lambda a=a, b=b, y=y: torch.mm(a, b, out=y)])["ms"]
            torch.backends.cuda.matmul.allow_tf32 = before
            rates[f"{name}_flops_s"] = 2 * 8192**3 / ms * 1e3
        return rates

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size


class DryTimer(Timer):
    """Runs each call once and measures nothing."""

    def kernels(self, calls: list[Call], repeats: int = 0) -> Row:
        for call in calls[:1]:
            call()
        return dict(NOT_MEASURED)

    def whole(self, call: Call, repeats: int = 0) -> Row:
        return self.kernels([call])

    def frames(self, call: Call, repeats: int = 0, seconds: float = 0.0) -> Row:
        return self.kernels([call])

    def memory(self, call: Call) -> Row:
        return {}

    def launches(self, call: Call, top: int = 0) -> Row:
        return {}

    def ceilings(self) -> dict[str, float]:
        return {}

    def l2_bytes(self) -> int:
        return 0


def timed(call: Call) -> float:
    """Milliseconds between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def behind_a_wait(calls: list[Call]) -> float:
    """Milliseconds that the GPU needs for the calls if all are enqueued before it begins with the first one.

    A call that waits for the GPU itself is timed with its gaps.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    host_ms = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(200.0, 2 * host_ms + 1) * CYCLES_PER_MS))

    def run() -> None:
        for call in calls:
            call()

    return timed(run)


def captured(calls: list[Call], rounds: int) -> Call:
    """A function that replays a CUDA graph of the calls, `rounds` times each.

    Raises RuntimeError if a call cannot be captured, or prepares weights again when it is.
    """
    if synchronisations(calls[0]):  # tried in vain, a capture would leave the allocator unable to free memory
        raise RuntimeError("a call waits for the GPU")
    graph, before = torch.cuda.CUDAGraph(), packing.preparations()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    if packing.preparations() != before:
        raise RuntimeError("weights are packed in it")
    return graph.replay


def synchronisations(call: Call) -> int:
    """How often a call waits for the GPU, as far as PyTorch sees."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def rotated(tensors: list[Tensor], l2_bytes: int) -> list[list[Tensor]]:
    """The tensors and copies of them, which together fill the L2 cache three times."""
    size = max(1, sum(t.nbytes for t in tensors))
    return [tensors, *([t.clone() for t in tensors] for _ in range(min(MOST_SETS - 1, 3 * l2_bytes // size)))]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of compilers, which would hide the rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
