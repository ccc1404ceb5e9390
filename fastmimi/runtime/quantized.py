"""Fake-quantized weights: fp32 values on a grid of 255 levels per output channel, which int8 stores without loss.

`round_weights` quantizes a model once; every device and backend then computes with the same fp32 values. A kernel may
store them as int8 and a scale per channel, a quarter of the bytes: reading weights is what limits a stream's step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import packing

MOST = 127  # steps on either side of 0
LEAST_WEIGHTS = 1 << 17  # of a layer: smaller layers are read in no time


def round_weights(model: nn.Module) -> None:
    """Quantize the weights of large layers in place; biases and codebooks stay.

    Weights keep their shape and fp32 dtype. Symmetric: each output channel's largest weight is 127 times its scale. A
    layer gets its scales [C_out] as a buffer `weight_scale`, which is not saved: rounding once more changes nothing.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)) and module.weight.numel() >= LEAST_WEIGHTS:
            channel = 1 if isinstance(module, nn.ConvTranspose1d) else 0
            grouped = channel == 1 and getattr(module, "groups", 1) > 1  # output channels are not one dimension
            if not grouped:
                weight, scale = round_to_grid(module.weight.detach().float(), channel)
                module.weight = nn.Parameter(weight, module.weight.requires_grad)
                if not hasattr(module, "parametrizations"):  # weight norm computes other weights
                    module.register_buffer("weight_scale", scale, persistent=False)


def round_to_grid(weight: Tensor, channel: int = 0) -> tuple[Tensor, Tensor]:
    """The nearest multiples of each output channel's scale, and the scales [C_out]; `channel` is that dimension."""
    others = [d for d in range(weight.dim()) if d != channel]
    steps = weight.abs().amax(others, keepdim=True) / MOST
    steps = ((steps.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)  # 16 bits: multiples up to 127 are exact
    return _integers(weight, steps) * steps, steps.flatten()


def scales_of(*modules: nn.Module) -> Tensor | None:
    """The scales of the modules' weights, one after the other; None unless all are quantized."""
    found = []
    for module in modules:
        scale = module._buffers.get("weight_scale")  # getattr would raise and catch an error in each layer of a frame
        if scale is None:
            return None
        found.append(scale)
    if len(found) == 1:
        return found[0]
    if torch.compiler.is_compiling():  # tracing sees no versions
        return torch.cat(found)
    return packing.packed(tuple(found), "scales", lambda *scales: torch.cat(scales))


def integers(weight: Tensor, scale: Tensor | None, channel: int = 0) -> Tensor | None:
    """The int8 values whose products with the scales [C_out] are the weight; None if there are none.

    There are none for a weight that is not quantized, or has been edited or cast since.
    """
    if scale is None or weight.dtype != torch.float32 or scale.dtype != torch.float32:
        return None
    steps = scale.view([-1 if d == channel else 1 for d in range(weight.dim())])
    whole = _integers(weight, steps)
    return whole.to(torch.int8) if torch.equal(whole * steps, weight) else None


def _integers(weight: Tensor, steps: Tensor) -> Tensor:
    return torch.where(steps > 0, (weight / steps).round(), 0).clamp(-MOST, MOST)
