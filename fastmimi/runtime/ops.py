"""The op table: the units that have a reference, kernels, a test and a benchmark under one name.

An op is what should be fused; models call ops and never a kernel. Every implementation of an op has the
signature and the semantics of its reference, `reference/<op>.py`, where the arguments are described.

`SCHEMAS` says the same to PyTorch: which tensors a kernel takes and gives, so that it can be traced without running
(torch_ops.py registers it). Kernels return tensors in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .layout import empty_channels_last

if TYPE_CHECKING:
    from .state import DirectionState

OPS: dict[str, str] = {
    "causal_conv1d": "[activation ->] causal, dilated, strided convolution + bias [-> activation] [+ residual]",
    "causal_conv_transpose1d": "[activation ->] transposed convolution, overlap-add, bias, trim",
    "resblock": "a SEANet residual unit: ELU, conv k3, ELU, conv k1, + input",
    "window_attention": "RoPE and causal attention over the last `window` positions, ring KV cache when streaming",
    "transformer_layer": "norm, window attention, norm, feed-forward, each half scaled and added to its input",
    "rvq_encode": "the residual chain of nearest-entry searches over all levels, in fp32",
    "rvq_decode": "sum over levels of the chosen codebook entries",
}


class Ops(NamedTuple):
    """One implementation of each op, bound by `dispatch.bind` for a (device, dtype)."""

    causal_conv1d: Callable[..., Tensor]
    causal_conv_transpose1d: Callable[..., Tensor]
    resblock: Callable[..., Tensor]
    window_attention: Callable[..., Tensor]
    transformer_layer: Callable[..., Tensor]
    rvq_encode: Callable[..., Tensor]
    rvq_decode: Callable[..., Tensor]


class ForwardContext(NamedTuple):
    """What one pass through the model carries from layer to layer, which none of them changes.

    ops: the bound implementations. state: the streaming state of this direction, None offline. lengths: [B] int64,
    samples of audio that belong to each row, None where all do. subtile: transformer positions that pass the layers
    near the audio at once, None: all. continues: the state says that streams begin, and an earlier subtile has begun.
    """

    ops: Ops
    state: DirectionState | None = None
    lengths: Tensor | None = None
    subtile: int | None = None
    continues: bool = False


@dataclass(frozen=True)
class Schema:
    """An op's tensors, options, what a step of a stream has besides (`!` marks what it changes), and its output.

    fake: from the arguments, an empty tensor of the output's shape, dtype and strides.
    """

    tensors: str
    options: str
    state: str
    fake: Callable[..., Tensor]

    @property
    def names(self) -> list[str]:
        """The names of `tensors`, in order."""
        return [tensor.split()[-1].partition("=")[0] for tensor in self.tensors.split(", ")]

    @property
    def state_names(self) -> list[str]:
        """The names of `state`, in order."""
        return [tensor.split()[-1] for tensor in self.state.split(", ") if tensor]


def _conv(
    x: Tensor, weight: Tensor, *_: Any, stride: int = 1, dilation: int = 1, pad: Any = (0, 0), **__: Any
) -> Tensor:
    length = (x.shape[2] + pad[0] + pad[1] - (weight.shape[2] - 1) * dilation - 1) // stride + 1
    return empty_channels_last(x, weight.shape[0], length)


def _conv_transpose(
    x: Tensor, weight: Tensor, *_: Any, stride: int = 1, groups: int = 1, trim: Any = (0, 0),
    overlap: Tensor | None = None, **__: Any,
) -> Tensor:  # fmt: skip
    channels, kernel = weight.shape[1] * groups, weight.shape[2]
    if overlap is not None:
        return empty_channels_last(x, channels, x.shape[2] * stride)
    return empty_channels_last(x, channels, (x.shape[2] - 1) * stride + kernel - trim[0] - trim[1])


def _resblock(x: Tensor, weight1: Tensor, *_: Any, dilation: int = 1, pad: Any = (0, 0), **__: Any) -> Tensor:
    return empty_channels_last(x, x.shape[1], x.shape[2] + pad[0] + pad[1] - (weight1.shape[2] - 1) * dilation)


def _attention(q: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _layer(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _encode(x: Tensor, codebooks: Tensor) -> Tensor:
    return x.new_empty(codebooks.shape[0], x.shape[0], dtype=torch.int64)


def _decode(codes: Tensor, codebooks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return codebooks.new_empty(codes.shape[1], codebooks.shape[2], dtype=dtype)


_RINGS = "Tensor offset, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor active"
_HISTORY = "Tensor(a!) history, Tensor first, Tensor active"
SCHEMAS: dict[str, Schema] = {
    "causal_conv1d": Schema(
        "Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None",
        "int stride=1, int dilation=1, int groups=1, SymInt[2] pad=[0, 0], str pad_mode='constant', "
        "str pre='none', str post='none'",
        _HISTORY,
        _conv,
    ),
    "causal_conv_transpose1d": Schema(
        "Tensor x, Tensor weight, Tensor? bias=None",
        "int stride=1, int groups=1, SymInt[2] trim=[0, 0], str pre='none'",
        "Tensor(a!) overlap, Tensor active",
        _conv_transpose,
    ),
    "resblock": Schema(
        "Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
        "Tensor? shortcut_weight=None, Tensor? shortcut_bias=None",
        "int dilation=1, SymInt[2] pad=[0, 0], str pad_mode='constant'",
        _HISTORY,
        _resblock,
    ),
    "window_attention": Schema(
        "Tensor q, Tensor k, Tensor v, Tensor inv_freq",
        "int window, float rope_scale=1.0, bool interleaved=False",
        _RINGS,
        _attention,
    ),
    "transformer_layer": Schema(
        "Tensor x, Tensor norm1_weight, Tensor? norm1_bias, Tensor q, Tensor k, Tensor v, Tensor o, Tensor? scale1, "
        "Tensor norm2_weight, Tensor? norm2_bias, Tensor fc1, Tensor fc2, Tensor? scale2, Tensor inv_freq, "
        "Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? o_bias=None",
        "int window, float eps, str norm='layer', str activation='gelu', float rope_scale=1.0",
        _RINGS,
        _layer,
    ),
    "rvq_encode": Schema("Tensor x, Tensor codebooks", "", "", _encode),
    "rvq_decode": Schema("Tensor codes, Tensor codebooks", "ScalarType? dtype=None", "", _decode),
}
