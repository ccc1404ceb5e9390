"""Weights on a grid of 255 levels for each output channel, which eight bits hold without loss. A leaf.

Rounding (`round_weights`) changes a model once, and the same for every device and implementation. What it leaves are
floats still: a kernel that reads an integer and multiplies by the channel's step computes with the same weights in a
quarter of the bytes, which is what a stream's step waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 127  # steps on either side of 0
LEAST_WEIGHTS = 1 << 17  # of a layer: smaller ones cost a stream nothing to read


def round_weights(model: nn.Module) -> None:
    """Replace the weights of large layers by the nearest points of their grids; biases and codebooks stay.

    Weights keep their shape, and are fp32. Symmetric: each output channel's largest weight is 127 of its steps.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)) and module.weight.numel() >= LEAST_WEIGHTS:
            transposed = isinstance(module, nn.ConvTranspose1d)
            grouped = transposed and getattr(module, "groups", 1) > 1  # output channels are not one dimension
            if not grouped:
                weight = round_to_grid(module.weight.detach().float(), channel=1 if transposed else 0)
                module.weight = nn.Parameter(weight, module.weight.requires_grad)


def round_to_grid(weight: Tensor, channel: int = 0) -> Tensor:
    """The nearest multiples of each output channel's step; `channel` is its dimension."""
    steps = _steps(weight, channel)
    return _integers(weight, steps) * steps


def integers(weight: Tensor, channel: int = 0) -> tuple[Tensor, Tensor] | None:
    """Integers in [-127, 127] as int8 and the steps, of the weight's shape both; None for a weight that is off grid."""
    if weight.dtype != torch.float32:
        return None
    few = weight.narrow(channel, 0, 1)  # most weights are off: seen at the first channel
    if not torch.equal(round_to_grid(few, channel), few):
        return None
    steps = _steps(weight, channel)
    whole = _integers(weight, steps)
    return (whole.to(torch.int8), steps.expand_as(weight)) if torch.equal(whole * steps, weight) else None


def _steps(weight: Tensor, channel: int) -> Tensor:
    """A step for each channel, with 16 significant bits: its multiples up to 127 are exact, and it is found again."""
    others = [d for d in range(weight.dim()) if d != channel]
    steps = weight.abs().amax(others, keepdim=True) / MOST
    return ((steps.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)


def _integers(weight: Tensor, steps: Tensor) -> Tensor:
    return torch.where(steps > 0, (weight / steps).round(), 0).clamp(-MOST, MOST)
