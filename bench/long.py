"""One long clip through one codec in a process of its own: time, and peak memory beyond that of the loaded model.

    python bench/long.py NAME FOLDER DIRECTION SECONDS [RESULT]

prints them as JSON and writes the codes or the audio to the file RESULT (torch.save). Linux only: the kernel counts the
peak, which is reset before the clip.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import peers
import torch

WARM_UP = 2  # seconds of audio
MIB = 1024  # KiB


def memory(what: str) -> float:
    """Memory of this process in MiB: "VmRSS" for the current and "VmHWM" for the peak resident size."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / MIB


def measure(name: str, folder: Path, direction: str, seconds: int) -> tuple[dict[str, float], torch.Tensor]:
    codec = peers.load(name, folder)
    assert codec is not None, f"{name} is not installed"
    run = getattr(codec, direction)

    def inputs(seconds: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        if direction == "encode":
            return torch.empty(1, 1, seconds * 24_000).normal_(0, 0.1, generator=generator)
        return torch.randint(0, 2048, (1, peers.CODEBOOKS, seconds * 25 // 2), generator=generator)

    x = inputs(seconds)
    run(inputs(WARM_UP))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = memory("VmRSS"), time.perf_counter()
    y = run(x)
    taken, added = time.perf_counter() - start, memory("VmHWM") - before
    return {"seconds": taken, "MiB": added}, y


if __name__ == "__main__":
    with torch.inference_mode():
        numbers, result = measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    if sys.argv[5:]:
        torch.save(result, sys.argv[5])
    print(json.dumps(numbers))
