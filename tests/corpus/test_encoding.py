"""Batches and long signals: codes identical to `encode` of each signal alone at fp32, in every kind of codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmimi
from fastmimi.corpus import encoding, local
from fastmimi.devtools.testing import CONFIGS, small_model

NAMES = [name for name in CONFIGS if name != "mimi"]


def signals(codec: fastmimi.Mimi, *lengths: int) -> list[np.ndarray]:
    """[n, channels] float32 of each length."""
    draw = np.random.default_rng(0)
    return [
        (draw.uniform(0.05, 0.5) * draw.standard_normal((n, codec.config.audio_channels))).astype(np.float32)
        for n in lengths
    ]


def alone(codec: fastmimi.Mimi, signal: np.ndarray) -> list[list[int]]:
    return codec.encode(torch.from_numpy(signal.T.copy())[None])[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_rows_alone(name: str) -> None:
    codec = small_model(name)
    size = codec.frame_size
    rows = signals(codec, 1, size - 1, size, size + 1, 7 * size, 30_000, 9 * size - 5, 30_000)
    for some in (rows, rows[:1], [rows[5], rows[7]]):
        found = encoding.encode_batch(codec, some)
        assert all(codes.dtype == np.int16 for codes in found)
        assert [codes.tolist() for codes in found] == [alone(codec, row) for row in some]


@pytest.mark.parametrize("name", ["small", "not_causal", "stereo"])
def test_a_long_signal_equals_one_call(name: str) -> None:
    codec = small_model(name)
    (signal,) = signals(codec, 60 * codec.frame_size + 17)
    blocks = [signal[start : start + 10_007] for start in range(0, len(signal), 10_007)]
    codes, samples = encoding.encode_long(codec, blocks)
    assert codes.dtype == np.int16
    assert samples == len(signal)
    assert codes.tolist() == alone(codec, signal)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["demo", "random:3"])
def test_whole_models(source: str) -> None:
    codec = fastmimi.load(source, num_codebooks=8)
    rows = signals(codec, 24_000, 100_001, 31_337, 61_000)
    assert [codes.tolist() for codes in encoding.encode_batch(codec, rows)] == [alone(codec, row) for row in rows]


@pytest.mark.parametrize("budget", [1, 5000, 10**6])
def test_lengths_that_the_manifest_did_not_know(codec: fastmimi.Mimi, budget: int) -> None:
    rows = [*signals(codec, 4000, 100, 9000), "unreadable", *signals(codec, 2000)]
    found = local.encoded(codec, rows, budget)
    assert found[3] == "unreadable"
    for row, result in zip(rows, found, strict=True):
        if not isinstance(row, str):
            codes, samples = result
            assert samples == len(row)
            assert codes.tolist() == alone(codec, row)  # type: ignore[union-attr]
    assert local.encoded(codec, ["a", "b"], budget) == ["a", "b"]
