"""Initialization of the weights of new codecs and discriminators."""

from __future__ import annotations

import torch
from torch import nn

from ..models.seanet import Surroundings

SILU_GAIN = 1.7  # SiLU scales the root mean square of standard normal noise by about 1 / 1.7


def variance_preserving_init_(root: nn.Module, gain: float = 1.0) -> None:
    """Give every convolution and linear layer normal weights that preserve the variance of its input, and zero biases.

    PyTorch's default initialization loses two thirds of the variance in each layer: after a dozen layers the output
    hardly depends on the audio. `gain` multiplies the weights to compensate for the activations between layers. A layer
    that applies SiLU itself (`around.post`) gets `SILU_GAIN` instead.
    """
    for module in root.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()  # terms of each output
            if isinstance(module, nn.ConvTranspose1d):
                fan_in = module.in_channels * module.kernel_size[0] // (module.stride[0] * module.groups)
            around = getattr(module, "around", None)
            layer_gain = SILU_GAIN if isinstance(around, Surroundings) and around.post == "silu" else gain
            weight = torch.randn(module.weight.shape) * layer_gain * max(fan_in, 1) ** -0.5
            with torch.no_grad():
                if hasattr(module, "parametrizations"):  # weight norm: the assignment splits it into norm and direction
                    module.weight = weight
                else:
                    module.weight.copy_(weight)
                if module.bias is not None:
                    module.bias.zero_()
