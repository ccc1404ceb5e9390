"""The memory layout of activations: channels-last, [B, C, T] whose channels are contiguous."""

from __future__ import annotations

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, T] with contiguous channels: x itself if it has them, else a copy."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_channels_last(x: Tensor, channels: int, length: int) -> Tensor:
    """An uninitialised tensor [B, channels, length] with contiguous channels."""
    return x.new_empty(x.shape[0], length, channels).transpose(1, 2)
