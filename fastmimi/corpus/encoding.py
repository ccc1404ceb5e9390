"""Signals to codes: ragged batches and long files, each row identical to `encode` of it alone at fp32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..io import transcode

if TYPE_CHECKING:
    from ..models.codec import Codec


def encode_batch(codec: Codec, signals: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Signals [n, channels] float32 at the codec's rate, finite -> codes [K, ceil(n / frame_size)] int16 of each."""
    counts = [len(signal) for signal in signals]
    audio = torch.zeros(len(signals), codec.config.audio_channels, max(counts))
    for row, signal in zip(audio, signals, strict=True):
        row[:, : len(signal)] = torch.from_numpy(signal.T)
    mask = None
    if min(counts) < max(counts):
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    with torch.inference_mode():
        codes = codec.encode(audio, padding_mask=mask).short().cpu().numpy()
    frames = [-(-count // codec.frame_size) for count in counts]
    return [row[:, :count].copy() for row, count in zip(codes, frames, strict=True)]


def encode_long(codec: Codec, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Blocks [n, channels] of one signal -> codes [K, T] int16, and how many samples there were.

    Memory does not grow with their number, unless the codec cannot stream.
    """
    total = 0

    def counted() -> Iterable[np.ndarray]:
        nonlocal total
        for block in blocks:
            total += len(block)
            yield block

    codes = transcode.encode(codec, counted(), transcode.Clock())
    return codes.astype(np.int16), total
