"""SEANet, the convolutional encoder and decoder (arXiv 2009.02095 as in 2410.00037, section 3.3.1).

Modules own parameters under transformers' names and know their paddings; the arithmetic is in the ops. Activations sit
before the convolutions and are fused into them, which is why the numbering of `layers` has gaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import packing
from ..runtime.ops import Call
from ..runtime.tiles import collected
from .config import CodecConfig


class Streaming:
    """What a convolution with a state has: a `name`, its path in the model, under which the state is kept."""

    name = ""

    @staticmethod
    def named(model: nn.Module) -> None:
        """Give each module of the model that has a state its name."""
        for name, module in model.named_modules():
            if hasattr(module, "state_shapes"):
                module.name = name


class PaddedConv1d(Streaming):
    """The streaming of a convolution `conv`, whatever module holds it: [B, C_in, T] -> [B, C_out, ceil(T / stride)]."""

    conv: nn.Conv1d
    pad_mode = "constant"
    pre = "none"
    post = "none"

    def sides(self, length: int) -> tuple[int, int]:
        """Samples to add left and right of `length`."""
        raise NotImplementedError

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, self.conv.in_channels, self.sides(0)[0])}

    def padded(self, x: Tensor, call: Call) -> dict[str, Any]:
        """The arguments of an op that say how x [B, C, T] is extended left and right."""
        arguments: dict[str, Any] = {"pad": self.sides(x.shape[-1]), "pad_mode": self.pad_mode}
        if call.lane is not None:
            history = call.lane.buffers[self.name]
            first = call.lane.first & False if call.continues else call.lane.first
            arguments |= {"history": history, "first": first, "active": call.lane.active}
        return arguments

    def forward(self, x: Tensor, call: Call) -> Tensor:
        conv = self.conv
        stride = conv.stride[0]
        if call.lengths is not None and stride > 1:
            x = fill_tail(x, call.lengths, self.pad_mode)
            call.lengths = -(-call.lengths // stride)
        return call.ops.causal_conv1d(
            x, weight_of(conv), conv.bias, stride=stride, dilation=conv.dilation[0], groups=conv.groups, pre=self.pre,
            post=self.post, **self.padded(x, call),
        )  # fmt: skip


class PaddedConvTranspose1d(Streaming):
    """The same of an upsampling transposed convolution, [B, C_in, T] -> [B, C_out, T * stride]."""

    conv: nn.ConvTranspose1d
    pre = "none"
    trim: tuple[int, int]  # of the full result; less than none on the right are outputs that no input reaches

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, self.conv.out_channels, max(0, sum(self.trim)))}

    def forward(self, x: Tensor, call: Call) -> Tensor:
        conv, state = self.conv, {}
        if call.lane is not None:
            state = {"overlap": call.lane.buffers[self.name], "active": call.lane.active}
        return call.ops.causal_conv_transpose1d(
            x, weight_of(conv), conv.bias, stride=conv.stride[0], groups=conv.groups, trim=self.trim, pre=self.pre,
            **state,
        )  # fmt: skip


def weight_of(conv: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """The weight; under weight norm (arXiv 1602.07868) computed once, and again after any change, but in training."""
    if not hasattr(conv, "parametrizations"):
        return conv.weight
    parametrizations: Any = conv.parametrizations
    pair = parametrizations.weight
    g, v = pair.original0, pair.original1
    trains = torch.is_grad_enabled() and (g.requires_grad or v.requires_grad)
    if trains or torch.compiler.is_compiling():  # tracing sees no versions
        return conv.weight
    dim = parametrizations.weight[0].dim
    return packing.packed((v, g), f"weight norm {dim}", lambda v, g: torch._weight_norm(v, g, dim))


class CausalConv1d(PaddedConv1d, nn.Module):
    """A padded convolution, [B, C_in, T] -> [B, C_out, ceil(T / stride)]; peer: transformers' `MimiConv1d`."""

    def __init__(
        self,
        config: CodecConfig,
        channels: tuple[int, int],
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        pad_mode: str | None = None,
        pre: str = "none",
    ):
        super().__init__()
        self.conv = nn.Conv1d(*channels, kernel_size, stride, dilation=dilation, bias=bias)
        self.causal = config.use_causal_conv
        self.pad_mode = pad_mode or config.pad_mode
        self.pre = pre

    def sides(self, length: int) -> tuple[int, int]:
        """Samples to add left and right of `length`; on the right, what the last stride needs to be full."""
        (kernel,), (stride,), (dilation,) = self.conv.kernel_size, self.conv.stride, self.conv.dilation
        total = (kernel - 1) * dilation + 1 - stride
        right = 0 if self.causal else total // 2
        return total - right, right + -length % stride


class CausalConvTranspose1d(PaddedConvTranspose1d, nn.Module):
    """An upsampling transposed convolution, [B, C_in, T] -> [B, C_out, T * stride]; peer: `MimiConvTranspose1d`."""

    def __init__(
        self,
        config: CodecConfig,
        channels: tuple[int, int],
        stride: int,
        *,
        groups: int = 1,
        bias: bool = True,
        pre: str = "none",
    ):
        super().__init__()
        self.conv = nn.ConvTranspose1d(*channels, 2 * stride, stride, groups=groups, bias=bias)
        total = stride  # kernel - stride
        right = math.ceil(total * config.trim_right_ratio) if config.use_causal_conv else total // 2
        self.trim = (total - right, right)
        self.pre = pre


class ResBlock(nn.Module):
    """A residual unit, [B, C, T] -> [B, C, T]; peer: `MimiResnetBlock`, with its numbering of the convolutions."""

    def __init__(self, config: CodecConfig, dim: int, dilation: int):
        super().__init__()
        hidden = dim // config.compress
        kernel = config.residual_kernel_size
        self.block = nn.ModuleDict(
            {
                "1": CausalConv1d(config, (dim, hidden), kernel, dilation=dilation),
                "3": CausalConv1d(config, (hidden, dim), 1),
            }
        )
        self.shortcut = CausalConv1d(config, (dim, dim), 1) if config.use_conv_shortcut else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        first: Any = self.block["1"]
        second: Any = self.block["3"]
        skip = {}
        if self.shortcut is not None:
            skip = {"shortcut_weight": self.shortcut.conv.weight, "shortcut_bias": self.shortcut.conv.bias}
        return call.ops.resblock(
            x, first.conv.weight, first.conv.bias, second.conv.weight, second.conv.bias,
            dilation=first.conv.dilation[0], **skip, **first.padded(x, call),
        )  # fmt: skip


class SeanetEncoder(nn.Module):
    """Audio [B, channels, N] -> latents [B, hidden_size, ceil(N / hop_length)]."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        width = config.num_filters
        layers: list[nn.Module | None] = [CausalConv1d(config, (config.audio_channels, width), config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            layers += [
                ResBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)
            ]
            layers += [None, CausalConv1d(config, (width, 2 * width), 2 * ratio, stride=ratio, pre="elu")]
            width *= 2
        layers += [None, CausalConv1d(config, (width, config.hidden_size), config.last_kernel_size, pre="elu")]
        self.layers = _numbered(layers)
        self.hop = math.prod(config.upsampling_ratios)  # samples per latent

    def forward(self, x: Tensor, call: Call) -> Tensor:
        layers = list(self.layers.values())
        blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ResBlock)]
        slow = blocks[-1] if blocks else 0
        return _run(layers[slow:], _run_in_pieces(layers[:slow], x, call, self.hop), call)


class SeanetDecoder(nn.Module):
    """Latents [B, hidden_size, T] -> audio [B, channels, T * hop_length]."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        width = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[nn.Module | None] = [CausalConv1d(config, (config.hidden_size, width), config.kernel_size)]
        for ratio in config.upsampling_ratios:
            layers += [None, CausalConvTranspose1d(config, (width, width // 2), ratio, pre="elu")]
            width //= 2
            layers += [
                ResBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)
            ]
        layers += [None, CausalConv1d(config, (width, config.audio_channels), config.last_kernel_size, pre="elu")]
        self.layers = _numbered(layers)
        self.ratio = config.upsampling_ratios[0]  # of the slow layers

    def forward(self, x: Tensor, call: Call) -> Tensor:
        layers = list(self.layers.values())
        blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ResBlock)]
        fast = blocks[0] if blocks else len(layers)
        return _run_in_pieces(layers[fast:], _run(layers[:fast], x, call), call, self.ratio)


def _run(layers: list[nn.Module], x: Tensor, call: Call) -> Tensor:
    for layer in layers:
        x = layer(x, call)
    return x


def _run_in_pieces(layers: list[nn.Module], x: Tensor, call: Call, samples: int) -> Tensor:
    """Layers near the audio, whose activations are large and whose weights are few, in pieces that stay in the caches.

    A piece is `call.piece` times `samples` of x [B, C, T] long. Pieces follow one another as the chunks of a stream do.
    """
    if call.piece is None or call.lane is None or x.shape[-1] <= call.piece * samples:
        return _run(layers, x, call)
    lengths, size = [], call.piece * samples

    def pieces() -> Iterator[Tensor]:
        for start in range(0, x.shape[-1], size):
            part = x[..., start : start + size]
            inside = None if call.lengths is None else (call.lengths - start).clamp(0, part.shape[-1])
            piece = replace(call, lengths=inside, continues=call.continues or start > 0)
            yield _run(layers, part, piece).transpose(1, 2)
            lengths.append(piece.lengths)

    y = collected(pieces(), x.shape[-1], size, dim=1)
    if call.lengths is not None:
        call.lengths = torch.stack([length for length in lengths if length is not None]).sum(dim=0)
    return y.transpose(1, 2)  # [B, C, T], channels-last as the pieces are


def fill_tail(x: Tensor, lengths: Tensor, pad_mode: str) -> Tensor:
    """Make x [B, C, T] beyond each row's length what the row alone would be padded with."""
    inside = (torch.arange(x.shape[-1], device=x.device) < lengths[:, None])[:, None]  # [B, 1, T]
    if pad_mode == "constant":
        return torch.where(inside, x, 0)
    last = (lengths - 1).clamp(0, x.shape[-1] - 1)[:, None, None].expand(-1, x.shape[1], 1)
    return torch.where(inside, x, x.gather(2, last))


def _numbered(layers: list[nn.Module | None]) -> nn.ModuleDict:
    """Layers under their index; None holds the number of an activation that is fused into the next layer."""
    return nn.ModuleDict({str(i): layer for i, layer in enumerate(layers) if layer is not None})
