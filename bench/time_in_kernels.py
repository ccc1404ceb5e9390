"""Where the time of a pass goes on a CPU: in each native kernel, in Python between them, and how many pages fault.

    python bench/time_in_kernels.py [--threads 1 2] [--seconds 1 10] [--dtype float32 bfloat16]

prints a Markdown table of medians, in ms per pass: offline for each length, and for a frame of one recorded stream,
whose kernels run as one call. Random weights, 8 codebooks.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import fastmimi
from fastmimi.devtools.testing import noise
from fastmimi.kernels.cpu._native import native

WARM_UP, SECONDS = 5, 4.0  # passes; to measure a case
MODEL, CODEBOOKS, FRAME = "random:0", 8, 1920


class Stopwatch:
    """Adds up the seconds that native calls take, by kernel."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = defaultdict(float)
        variant = native()
        variant._run = self.timed(variant._run, lambda function, _: function.__name__.removesuffix(f"_{variant.name}"))
        variant.run_program = self.timed(variant.run_program, lambda *_: "a recorded step")

    def timed(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            call(*arguments)
            self.taken[name(*arguments)] += time.perf_counter() - start

        return run


def measure(stopwatch: Stopwatch, call: Callable[[], object]) -> dict[str, float]:
    """Medians of a call's passes: ms in all, in each kernel and in Python, and page faults."""
    rows: list[dict[str, float]] = []
    for _ in range(WARM_UP):
        call()
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        stopwatch.taken.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        total = time.perf_counter() - start
        kernels = {name: seconds * 1e3 for name, seconds in stopwatch.taken.items()}
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        python = total * 1e3 - sum(kernels.values())
        rows.append({"in all": total * 1e3, **kernels, "Python": python, "page faults": faults})
    return {name: median(row.get(name, 0.0) for row in rows) for name in rows[-1]}


def passes(mimi: Any, seconds: list[float]) -> dict[str, Callable[[], object]]:
    """The passes to measure, by name."""
    found: dict[str, Callable[[], object]] = {}
    for length in seconds:
        audio = noise(1, 1, -(-int(length * 24_000) // FRAME) * FRAME, scale=0.1)
        codes = mimi.encode(audio)
        found[f"encode {length:g} s"] = lambda audio=audio: mimi.encode(audio)
        found[f"decode {length:g} s"] = lambda codes=codes: mimi.decode(codes)
    state = mimi.new_state()
    mimi.warm_up(state, num_codebooks=CODEBOOKS)
    frame = noise(1, 1, FRAME, scale=0.1)
    codes = mimi.encode(frame)
    found["encode a frame"] = lambda: mimi.encode(frame, state=state)
    found["decode a frame"] = lambda: mimi.decode(codes, state=state)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    chosen = parser.parse_args()
    stopwatch, rows = Stopwatch(), {}
    with torch.inference_mode():
        for dtype in chosen.dtype:
            mimi = fastmimi.load(MODEL, num_codebooks=CODEBOOKS, dtype=getattr(torch, dtype))
            for threads in chosen.threads:
                torch.set_num_threads(threads)
                for name, call in passes(mimi, chosen.seconds).items():
                    rows[f"{name}, {dtype}, threads: {threads}"] = measure(stopwatch, call)
    columns = [*dict.fromkeys(name for row in rows.values() for name in row)]
    columns.sort(key=lambda name: (name != "in all") + (name in ("Python", "page faults")))
    print("| |" + "|".join(columns) + "|\n|" + "---|" * (1 + len(columns)))
    for name, row in rows.items():
        print(f"| {name} |" + "|".join(f" {row[column]:.4g} " if column in row else " - " for column in columns) + "|")


if __name__ == "__main__":
    main()
