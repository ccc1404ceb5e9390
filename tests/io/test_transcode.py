"""Transcoding blocks of audio through a stream, without reading ahead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fastmimi.devtools.testing import small_model
from fastmimi.io import transcode


def test_blocks_are_not_read_ahead() -> None:
    """Each block is encoded before the next one is read, so that memory use does not grow with the length."""
    codec, clock = small_model(), transcode.Clock()
    seen = []

    def blocks() -> Iterator[np.ndarray]:
        for _ in range(6):
            seen.append(clock.steps)
            yield np.zeros((transcode.STEP_FRAMES * 1920, 1), np.float32)

    codes = transcode.encode(codec, blocks(), clock)
    assert seen == [0, 1, 2, 3, 4, 5]
    decoded = transcode.decode(codec, codes, 1920 * codes.shape[1], clock)
    assert next(decoded).shape == (transcode.STEP_FRAMES * 1920, 1)
    assert clock.steps == 7


def test_frame_by_frame_takes_one_step_per_frame() -> None:
    codec, clock = small_model(), transcode.Clock()
    codes = transcode.encode(codec, [np.zeros((5_000, 1), np.float32)], clock, frame_by_frame=True)
    assert clock.steps == 4  # two whole frames, an incomplete one, the flush
    blocks = [*transcode.decode(codec, codes, 5_000, clock, frame_by_frame=True)]
    assert [len(block) for block in blocks] == [1920, 1920, 1160]


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_rechunk(size: int) -> None:
    samples = np.arange(50)[:, None]
    blocks = [samples[:0], samples[:7], samples[7:8], samples[8:40], samples[40:]]
    found = [*transcode.rechunk(iter(blocks), size)]
    np.testing.assert_array_equal(np.concatenate(found), samples)
    assert {len(block) for block in found[:-1]} <= {size}
    assert len(found[-1]) <= size
