"""SEANet, the convolutional encoder and decoder (arXiv 2009.02095 as in 2410.00037, section 3.3.1).

Modules own parameters under transformers' names and know their paddings; the arithmetic is in the ops. The activation
between two layers is fused into the first of them, which applies it once per element (the second would once per tap);
it keeps its number, which is why the numbering of `layers` has gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import packing
from ..runtime.ops import ForwardContext
from ..runtime.quantized import scales_of
from ..runtime.signatures import History, Padding
from ..runtime.state import StreamingModule
from .config import MimiCodecConfig


@dataclass(frozen=True)
class Surroundings:
    """What stands around a convolution: padding or, in streams, history, and the activations fused into it.

    left, right: samples of padding; more on the right, up to a `multiple` of the input's length.
    samples: of audio between two steps of the input.
    """

    left: int
    right: int = 0
    multiple: int = 1
    mode: str = "constant"
    pre: str = "none"
    post: str = "none"
    samples: int = 1

    def padding(self, x: Tensor, context: ForwardContext, name: str) -> Padding:
        """The op's arguments for what stands before and after x [B, C, T]: padding, or the history kept as `name`."""
        pad = (self.left, self.right + -x.shape[-1] % self.multiple)
        return {"pad": pad, "pad_mode": self.mode, **history_of(context, name)}

    def convolve(self, conv: nn.Conv1d, x: Tensor, context: ForwardContext, name: str) -> Tensor:
        """[B, C_in, T] -> [B, C_out, ceil(T / stride)], with the state kept as `name`."""
        stride = conv.stride[0]
        if context.lengths is not None and stride > 1:
            x = fill_tail(x, -(-context.lengths // self.samples), self.mode)
        return context.ops.causal_conv1d(
            x, weight_of(conv), conv.bias, stride=stride, dilation=conv.dilation[0], groups=conv.groups, pre=self.pre,
            post=self.post, scales=scales_of(conv), **self.padding(x, context, name),
        )  # fmt: skip


def history_of(context: ForwardContext, name: str) -> History:
    """The op's arguments for the history kept as `name`; none offline."""
    if context.state is None:
        return {}
    assert context.first is not None, "a context with a state says which rows are at its start"
    state = context.state
    return {"history": state.buffers[name], "first": context.first, "active": state.active, "rows": state.rows}


def upsample(
    conv: nn.ConvTranspose1d, trim: tuple[int, int], x: Tensor, context: ForwardContext, name: str, pre: str = "none"
) -> Tensor:
    """[B, C_in, T] -> [B, C_out, T * stride], with the last inputs of streams kept as `name`.

    trim: of the full result; a negative number on the right appends outputs that no input reaches.
    """
    return context.ops.causal_conv_transpose1d(
        x, weight_of(conv), conv.bias, stride=conv.stride[0], groups=conv.groups, trim=trim, pre=pre,
        scales=scales_of(conv), **history_of(context, name),
    )  # fmt: skip


def weight_of(conv: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """The weight; with weight norm (arXiv 1602.07868) it is cached until g or v change, except in training."""
    if torch.compiler.is_compiling() or not hasattr(conv, "parametrizations"):  # tracing sees no versions
        return conv.weight
    parametrizations: Any = conv.parametrizations
    pair = parametrizations.weight
    g, v = pair.original0, pair.original1
    trains = torch.is_grad_enabled() and (g.requires_grad or v.requires_grad)
    if trains:
        return conv.weight
    dim = parametrizations.weight[0].dim
    return packing.packed((v, g), f"weight norm {dim}", lambda v, g: torch._weight_norm(v, g, dim))


class CausalConv1d(StreamingModule, nn.Module):
    """A padded convolution, [B, C_in, T] -> [B, C_out, ceil(T / stride)]; peer: transformers' `MimiConv1d`."""

    def __init__(
        self, config: MimiCodecConfig, channels: tuple[int, int], kernel_size: int, *, stride: int = 1,
        dilation: int = 1, bias: bool = True, pad_mode: str | None = None, samples: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv1d(*channels, kernel_size, stride, dilation=dilation, bias=bias)
        total = (kernel_size - 1) * dilation + 1 - stride
        right = 0 if config.use_causal_conv else total // 2
        mode = pad_mode or config.pad_mode
        self.around = Surroundings(total - right, right, stride, mode, samples=samples)

    @property
    def post(self) -> str:
        """The activation that is fused into it."""
        return self.around.post

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, self.around.left, self.conv.in_channels)}

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.around.convolve(self.conv, x, context, self.name)

    @property
    def joins(self) -> bool:
        """Whether `audio_resblock` can compute it: it is causal, padded with zeros, and nothing is fused into it."""
        plain = self.conv.bias is not None and self.around == Surroundings(self.conv.kernel_size[0] - 1)
        return plain and not _has_hooks(self)


class CausalConvTranspose1d(StreamingModule, nn.Module):
    """An upsampling transposed convolution, [B, C_in, T] -> [B, C_out, T * stride]; peer: `MimiConvTranspose1d`."""

    def __init__(
        self, config: MimiCodecConfig, channels: tuple[int, int], stride: int, *, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        self.conv = nn.ConvTranspose1d(*channels, 2 * stride, stride, groups=groups, bias=bias)
        total = stride  # kernel - stride
        right = math.ceil(total * config.trim_right_ratio) if config.use_causal_conv else total // 2
        self.trim = (total - right, right)
        self.pre = "none"

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, 1, self.conv.in_channels)}

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return upsample(self.conv, self.trim, x, context, self.name, self.pre)


class ResBlock(nn.Module):
    """A residual unit, [B, C, T] -> [B, C, T]; peer: `MimiResnetBlock`, with its numbering of the convolutions."""

    def __init__(self, config: MimiCodecConfig, dim: int, dilation: int):
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
        self.post = "none"

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        first: Any = self.block["1"]
        second: Any = self.block["3"]
        shortcut = None if self.shortcut is None else self.shortcut.conv
        return context.ops.resblock(
            x, first.conv.weight, first.conv.bias, second.conv.weight, second.conv.bias,
            dilation=first.conv.dilation[0], post=self.post, scales=scales_of(first.conv, second.conv),
            shortcut_weight=None if shortcut is None else shortcut.weight,
            shortcut_bias=None if shortcut is None else shortcut.bias,
            **first.around.padding(x, context, first.name),
        )  # fmt: skip

    @property
    def joins(self) -> bool:
        """Whether `audio_resblock` can compute it: it is causal, padded with zeros, and has no shortcut convolution."""
        first: Any = self.block["1"]
        left = (first.conv.kernel_size[0] - 1) * first.conv.dilation[0]
        return self.shortcut is None and first.around == Surroundings(left) and not _has_hooks(self)

    def joined(self, x: Tensor, context: ForwardContext, audio: CausalConv1d, after: bool) -> Tensor:
        """The unit and the convolution before or `after` it, of a whole signal, as one op."""
        first: Any = self.block["1"]
        second: Any = self.block["3"]
        assert context.ops.audio_resblock is not None and audio.conv.bias is not None
        return context.ops.audio_resblock(
            x, first.conv.weight, first.conv.bias, second.conv.weight, second.conv.bias, weight_of(audio.conv),
            audio.conv.bias, after=after, dilation=first.conv.dilation[0], post=self.post,
        )  # fmt: skip


class SeanetEncoder(nn.Module):
    """Audio [B, channels, N] -> latents [B, hidden_size, ceil(N / hop_length)]."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        width, hop = config.num_filters, 1  # samples of audio between two steps
        layers: list[nn.Module | None] = [CausalConv1d(config, (config.audio_channels, width), config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            layers += [
                ResBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)
            ]
            layers += [None, CausalConv1d(config, (width, 2 * width), 2 * ratio, stride=ratio, samples=hop)]
            width, hop = width * 2, hop * ratio
        layers += [None, CausalConv1d(config, (width, config.hidden_size), config.last_kernel_size)]
        self.layers = _numbered(layers)
        self.hop = hop

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        layers = list(self.layers.values())
        blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ResBlock)]
        slow = blocks[-1] if blocks else 0
        return _run(layers[slow:], _run(layers[:slow], x, context, self.hop), context)


class SeanetDecoder(nn.Module):
    """Latents [B, hidden_size, T] -> audio [B, channels, T * hop_length]."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        width = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[nn.Module | None] = [CausalConv1d(config, (config.hidden_size, width), config.kernel_size)]
        for ratio in config.upsampling_ratios:
            layers += [None, CausalConvTranspose1d(config, (width, width // 2), ratio)]
            width //= 2
            layers += [
                ResBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)
            ]
        layers += [None, CausalConv1d(config, (width, config.audio_channels), config.last_kernel_size)]
        self.layers = _numbered(layers)
        self.ratio = config.upsampling_ratios[0]  # of the slow layers

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        layers = list(self.layers.values())
        blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ResBlock)]
        fast = blocks[0] if blocks else len(layers)
        return _run(layers[fast:], _run(layers[:fast], x, context), context, self.ratio)


def _run(layers: list[nn.Module], x: Tensor, context: ForwardContext, steps: int | None = None) -> Tensor:
    """Layers one after another.

    Those near the audio, whose activations are large and whose weights are few, run in subtiles that fit the caches. A
    subtile is `context.subtile` positions of `steps` time steps of x [B, C, T]. They follow one another as the chunks
    of a stream do.
    """
    size = None if steps is None or context.subtile is None or context.state is None else context.subtile * steps
    if size is None or x.shape[-1] <= size:
        for layer in _joined(layers, context):
            x = layer(x, context)
        return x
    result, done = None, 0
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size]
        inside = None if context.lengths is None else (context.lengths - start).clamp(0, part.shape[-1])
        first = context.first if start == 0 or context.first is None else context.first & False
        y = _run(layers, part, context._replace(lengths=inside, first=first)).transpose(1, 2)  # [B, T', C']
        if result is None:  # results kept until the last one would fragment the memory between the activations
            result = y.new_empty(len(x), -(-x.shape[-1] * y.shape[1] // size), y.shape[2])
        result[:, done : done + y.shape[1]] = y
        done += y.shape[1]
    assert result is not None and done == result.shape[1], "subtiles are whole positions"
    return result.transpose(1, 2)  # [B, C', T''], channels-last


def _joined(layers: list[nn.Module], context: ForwardContext) -> list[Callable[..., Tensor]]:
    """The layers; offline, a convolution at either end and the residual unit beside it are one if a kernel has both."""
    steps: list[Callable[..., Tensor]] = list(layers)
    if context.state is not None or context.ops.audio_resblock is None or len(layers) < 2:
        return steps
    first, second, before, last = *layers[:2], *layers[-2:]
    if isinstance(before, ResBlock) and isinstance(last, CausalConv1d) and before.joins and last.joins:
        steps[-2:] = [partial(before.joined, audio=last, after=True)]
    elif isinstance(first, CausalConv1d) and isinstance(second, ResBlock) and first.joins and second.joins:
        steps[:2] = [partial(second.joined, audio=first, after=False)]
    return steps


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, which run only if it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fill_tail(x: Tensor, lengths: Tensor, pad_mode: str) -> Tensor:
    """x [B, C, T] with each row continued beyond its length by the padding that the row alone would get."""
    inside = (torch.arange(x.shape[-1], device=x.device) < lengths[:, None])[:, None]  # [B, 1, T]
    if pad_mode == "constant":
        return torch.where(inside, x, 0)
    last = (lengths - 1).clamp(0, x.shape[-1] - 1)[:, None, None].expand(-1, x.shape[1], 1)
    return torch.where(inside, x, x.gather(2, last))


def _numbered(layers: list[nn.Module | None]) -> nn.ModuleDict:
    """Layers under their index; None stands for an ELU, which is fused into the layer before it.

    A transposed convolution, which is there only without residual units, has none: then it is in the layer after it.
    """
    for before, activation, after in zip(layers, layers[1:], layers[2:], strict=False):
        if activation is None:
            if isinstance(before, CausalConv1d):
                before.around = replace(before.around, post="elu")
            elif isinstance(before, ResBlock):
                before.post = "elu"
            elif isinstance(after, CausalConv1d):
                after.around = replace(after.around, pre="elu")
            elif isinstance(after, CausalConvTranspose1d):
                after.pre = "elu"
    return nn.ModuleDict({str(i): layer for i, layer in enumerate(layers) if layer is not None})
