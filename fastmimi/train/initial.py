"""Weights to begin with."""

from __future__ import annotations

import torch
from torch import nn

SILU_GAIN = 1.7  # what SiLU takes from the size of normal noise


def keep_the_power(root: nn.Module, gain: float = 1.0) -> None:
    """Random weights that give back the power of what they take, and no biases.

    PyTorch's own lose two thirds of it in each layer: after a dozen of these nothing tells of the audio. `gain` makes
    up for what stands between the layers; a SiLU that a layer holds itself is made up for anyway.
    """
    for module in root.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d | nn.Linear):
            taps = module.weight[0].numel()  # of an output
            if isinstance(module, nn.ConvTranspose1d):
                taps = module.in_channels * module.kernel_size[0] // (module.stride[0] * module.groups)
            own = SILU_GAIN if getattr(module, "post", "none") == "silu" else gain
            weight = torch.randn(module.weight.shape) * own * max(taps, 1) ** -0.5
            with torch.no_grad():
                if hasattr(module, "parametrizations"):  # weight norm, which splits it
                    module.weight = weight
                else:
                    module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.zero_()
