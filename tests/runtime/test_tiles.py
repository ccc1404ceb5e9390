"""How much audio passes through a codec at once."""

import pytest
import torch

from fastmimi.runtime import tiles
from fastmimi.runtime.tiles import Tiling

MIMI, GPU = Tiling(1920, 2, 64), torch.device("cuda")
GIB = 1 << 30


@pytest.mark.parametrize("dtype, free, at_once", [
    (torch.bfloat16, 70 * GIB, True),
    (torch.float32, 70 * GIB, True),
    (torch.bfloat16, 8 * GIB, False),
])  # fmt: skip
def test_a_gpu_takes_what_its_memory_holds(monkeypatch, dtype, free, at_once):
    """64 clips of 10 s: 15.7 million samples, whose widest activation takes 2 GB in bf16."""
    monkeypatch.setattr(tiles, "free_bytes", lambda device: free)
    assert MIMI.runs_at_once(125, 64, GPU, dtype) == at_once
    frames = MIMI.frames_per_tile(125, 64, GPU, dtype)
    held = frames * 64 * 1920 * 64 * dtype.itemsize * tiles.ACTIVATIONS
    assert frames >= 1 and held <= free * tiles.SHARE


def test_a_gpu_with_little_memory_takes_some_audio(monkeypatch):
    monkeypatch.setattr(tiles, "free_bytes", lambda device: 0)
    assert MIMI.frames_per_tile(10**6, 1, GPU, torch.float32) == tiles.TILE_SAMPLES_ACCELERATOR // 1920


def test_free_memory_is_not_asked_for_short_audio(monkeypatch):
    """It takes a call of the driver, which a frame of streams must not wait for."""
    monkeypatch.setattr(tiles, "free_bytes", lambda device: pytest.fail("asked"))
    assert MIMI.runs_at_once(1, 1024, GPU, torch.bfloat16)


def test_wide_codecs_take_shorter_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "free_bytes", lambda device: 16 * GIB)
    wide = Tiling(1920, 1, 896)
    frames = [tiling.frames_per_tile(10**6, 1, GPU, torch.bfloat16) for tiling in (MIMI, wide)]
    assert frames[0] == pytest.approx(14 * frames[1], rel=0.01)
