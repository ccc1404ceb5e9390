"""What waits in a stream: its input, checked and in frames, and its results."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models import checks
from ..models.config import AnyConfig


class AudioQueue:
    """Samples [channels, n] on the CPU, in the order in which they were pushed."""

    def __init__(self) -> None:
        self._chunks: deque[Tensor] = deque()
        self.length = 0

    def push(self, audio: Tensor) -> None:
        if audio.shape[-1]:
            self._chunks.append(audio)
            self.length += audio.shape[-1]

    def take(self, count: int) -> Tensor:
        """The first `count` samples, of which there are as many."""
        parts, missing = [], count
        while missing:
            chunk = self._chunks.popleft()
            parts.append(chunk[..., :missing])
            if chunk.shape[-1] > missing:
                self._chunks.appendleft(chunk[..., missing:])
            missing -= parts[-1].shape[-1]
        self.length -= count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def complete(self, size: int) -> int:
        """Fill the last frame of `size` samples with zeros; how many."""
        if missing := -self.length % size:
            self.push(self._chunks[-1].new_zeros(len(self._chunks[-1]), missing))
        return missing


def samples(audio: Any, config: AnyConfig) -> Tensor:
    """Audio that a user pushes, [N] or [channels, N], float or int16, as fp32 [channels, N] of its own memory.

    Raises InputError for another shape or dtype, and for NaN or infinite samples.
    """
    x = _tensor(audio, "audio")
    if x.dim() == 1 and config.audio_channels == 1:
        x = x[None]
    if x.dim() != 2 or x.shape[0] != config.audio_channels:
        raise InputError(f"audio must be [{config.audio_channels}, samples], got {tuple(x.shape)}")
    if x.dtype == torch.int16:
        return x.float() / 32768
    if not x.is_floating_point():
        raise InputError(f"audio must be floating point in [-1, 1], or int16, got {str(x.dtype)[6:]}")
    checks.finite(x[None].cpu())
    return x.to("cpu", torch.float32, copy=True)


def frames(codes: Any, config: AnyConfig) -> list[Tensor]:
    """Codes that a user pushes, [K] or [K, T] integers, as frames [K] int64.

    Raises InputError for another shape or dtype, for K that the codec does not have, and for codes out of range.
    """
    x = _tensor(codes, "codes")
    if x.dim() == 1:
        x = x[:, None]
    if x.dim() != 2:
        raise InputError(f"codes must be [codebooks, frames], got {tuple(x.shape)}")
    x, _ = checks.code_range(checks.codes(x[None], config).cpu(), config)
    return [frame.clone() for frame in x[0].unbind(-1)]


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        return torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of numbers, got {type(values).__name__} ({error})") from None
