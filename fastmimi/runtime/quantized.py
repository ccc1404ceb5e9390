"""Fake-quantized weights: fp32 values on a grid of 255 levels per output channel, which int8 stores without loss.

`round_weights` quantizes a model once; every device and backend then computes with the same fp32 values. A kernel may
store them as int8 and a scale per channel, a quarter of the bytes: reading weights is what limits a stream's step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 127  # steps on either side of 0
LEAST_WEIGHTS = 1 << 17  # of a layer: smaller layers are read in no time


def round_weights(model: nn.Module) -> None:
    """Quantize the weights of large layers in place; biases and codebooks stay.

    Weights keep their shape and fp32 dtype. Symmetric: each output channel's largest weight is 127 times its scale.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)) and module.weight.numel() >= LEAST_WEIGHTS:
            transposed = isinstance(module, nn.ConvTranspose1d)
            grouped = transposed and getattr(module, "groups", 1) > 1  # output channels are not one dimension
            if not grouped:
                weight = round_to_grid(module.weight.detach().float(), channel=1 if transposed else 0)
                module.weight = nn.Parameter(weight, module.weight.requires_grad)


def round_to_grid(weight: Tensor, channel: int = 0) -> Tensor:
    """The nearest multiples of each output channel's scale; `channel` is that dimension."""
    steps = _steps(weight, channel)
    return _integers(weight, steps) * steps


def integers(weight: Tensor, channel: int = 0) -> tuple[Tensor, Tensor] | None:
    """int8 values in [-127, 127] and scales, both of the weight's shape; None for a weight that is not quantized."""
    if weight.dtype != torch.float32:
        return None
    few = weight.narrow(channel, 0, 1)  # most weights are not: their first channel shows it
    if not torch.equal(round_to_grid(few, channel), few):
        return None
    steps = _steps(weight, channel)
    whole = _integers(weight, steps)
    return (whole.to(torch.int8), steps.expand_as(weight)) if torch.equal(whole * steps, weight) else None


def _steps(weight: Tensor, channel: int) -> Tensor:
    """A scale per channel with 16 significant bits: its multiples up to 127 are exact, so it can be recovered."""
    others = [d for d in range(weight.dim()) if d != channel]
    steps = weight.abs().amax(others, keepdim=True) / MOST
    return ((steps.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)


def _integers(weight: Tensor, steps: Tensor) -> Tensor:
    return torch.where(steps > 0, (weight / steps).round(), 0).clamp(-MOST, MOST)
