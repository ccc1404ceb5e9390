"""The op table `OPS`: the units that have a reference, kernels, tests and workloads under one name.

An op is what should be fused; models call ops and never a kernel. Every implementation of an op has the signature and
the semantics of its reference, `reference/<op>.py`, where the arguments are described; torch_ops.py registers kernels
with PyTorch by their schema. Kernels return tensors in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import signatures
from .layout import empty_channels_last
from .lengths import convolved, upsampled

if TYPE_CHECKING:
    from .state import DirectionState


class Ops(NamedTuple):
    """One implementation of each op, bound by `dispatch.bind` for a (device, dtype)."""

    causal_conv1d: signatures.CausalConv1d
    causal_conv_transpose1d: signatures.CausalConvTranspose1d
    resblock: signatures.Resblock
    audio_resblock: signatures.AudioResblock | None  # None without a kernel: then the two ops that it is composed of
    window_attention: signatures.WindowAttention
    transformer_layer: signatures.TransformerLayer
    rvq_encode: signatures.RvqEncode
    rvq_decode: signatures.RvqDecode


class ForwardContext(NamedTuple):
    """What one pass through the model hands to every layer; immutable.

    ops: the bound implementations. state: the streaming state of this direction, None offline. lengths: [B] int64,
    samples of audio that belong to each row, None where all do. subtile: transformer positions that pass the layers
    near the audio at once, None: all. first: [B] bool, with a state: rows for which this is the start of a stream.
    """

    ops: Ops
    state: DirectionState | None = None
    lengths: Tensor | None = None
    subtile: int | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Op:
    """What an op is: all that dispatch, registration, the cost model, workloads and benchmarks know of it.

    tensors, options, state: its arguments in PyTorch's schema language; `state` is what a chunk of a stream has
        besides, `!` marks what it changes.
    fake: from the arguments, an empty tensor of the result's shape, dtype and strides.
    flops: from the result and the arguments; a multiplication and an addition count as two.
    time: the dimension of the result that is time.
    composed_of: the ops that run instead where a backend lacks this one, within the reference of this one.
    """

    summary: str
    tensors: str
    options: str
    state: str
    fake: Callable[..., Tensor]
    flops: Callable[..., float]
    time: int = 2
    differentiable: bool = True
    composed_of: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of `tensors`, in order."""
        return [tensor.split()[-1].partition("=")[0] for tensor in self.tensors.split(", ")]

    @property
    def state_names(self) -> list[str]:
        """The names of `state`, in order."""
        return [tensor.split()[-1].partition("=")[0] for tensor in self.state.split(", ") if tensor]


def _conv(
    x: Tensor, weight: Tensor, *_: object, stride: int = 1, dilation: int = 1, pad: tuple[int, int] = (0, 0),
    **__: object,
) -> Tensor:  # fmt: skip
    return empty_channels_last(x, weight.shape[0], convolved(x.shape[2], weight.shape[2], stride, dilation, pad))


def _conv_flops(y: Tensor, x: Tensor, weight: Tensor, *_: object, **__: object) -> float:
    return 2.0 * y.shape[0] * y.shape[2] * weight.numel()


def _conv_transpose(
    x: Tensor, weight: Tensor, *_: object, stride: int = 1, groups: int = 1, trim: tuple[int, int] = (0, 0),
    history: Tensor | None = None, **__: object,
) -> Tensor:  # fmt: skip
    channels, kernel = weight.shape[1] * groups, weight.shape[2]
    if history is not None:
        return empty_channels_last(x, channels, x.shape[2] * stride)
    return empty_channels_last(x, channels, upsampled(x.shape[2], kernel, stride, trim))


def _conv_transpose_flops(y: Tensor, x: Tensor, weight: Tensor, *_: object, **__: object) -> float:
    return 2.0 * x.shape[0] * x.shape[2] * weight.numel()


def _resblock(
    x: Tensor, weight1: Tensor, *_: object, dilation: int = 1, pad: tuple[int, int] = (0, 0), **__: object
) -> Tensor:
    return empty_channels_last(x, x.shape[1], convolved(x.shape[2], weight1.shape[2], 1, dilation, pad))


def _resblock_flops(
    y: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    shortcut_weight: Tensor | None = None, *_: object, **__: object,
) -> float:  # fmt: skip
    weights = weight1.numel() + weight2.numel() + (0 if shortcut_weight is None else shortcut_weight.numel())
    return 2.0 * y.shape[0] * y.shape[2] * weights


def _audio_resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, audio_weight: Tensor,
    audio_bias: Tensor, *, after: bool = False, **_: object,
) -> Tensor:  # fmt: skip
    return empty_channels_last(x, len(audio_weight if after else weight2), x.shape[2])


def _audio_resblock_flops(y: Tensor, x: Tensor, *weights: Tensor, **_: object) -> float:
    return 2.0 * y.shape[0] * y.shape[2] * sum(w.numel() for w in weights if w.dim() == 3)


def _attention(q: Tensor, *_: object, **__: object) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _attention_flops(y: Tensor, q: Tensor, *_: object, window: int, **__: object) -> float:
    return 4.0 * q.numel() * min(q.shape[2], window)


def _layer(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _layer_flops(y: Tensor, x: Tensor, *tensors: Tensor | None, window: int, **__: object) -> float:
    matrices = [tensor for tensor in tensors if tensor is not None and tensor.dim() == 2]  # q, k, v, o, fc1, fc2
    rows, width = x.shape[0] * x.shape[1], matrices[0].shape[0]
    return 2.0 * rows * sum(m.numel() for m in matrices) + 4.0 * rows * min(x.shape[1], window) * width


def _encode(x: Tensor, codebooks: Tensor) -> Tensor:
    return x.new_empty(codebooks.shape[0], x.shape[0], dtype=torch.int64)


def _encode_flops(y: Tensor, x: Tensor, codebooks: Tensor) -> float:
    return 2.0 * x.shape[0] * codebooks.numel()


def _decode(codes: Tensor, codebooks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return codebooks.new_empty(codes.shape[1], codebooks.shape[2], dtype=dtype)


def _decode_flops(y: Tensor, codes: Tensor, *_: object, **__: object) -> float:
    return float(y.numel() * codes.shape[0])


_RINGS = "Tensor offset, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor active, Tensor? rows=None"
_HISTORY = "Tensor(a!) history, Tensor first, Tensor active, Tensor? rows=None"
OPS: dict[str, Op] = {
    "causal_conv1d": Op(
        "[activation ->] causal, dilated, strided convolution + bias [+ residual] [-> activation]",
        "Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? scales=None",
        "int stride=1, int dilation=1, int groups=1, SymInt[2] pad=[0, 0], str pad_mode='constant', "
        "str pre='none', str post='none'",
        _HISTORY, _conv, _conv_flops,
    ),
    "causal_conv_transpose1d": Op(
        "[activation ->] transposed convolution, bias, trim",
        "Tensor x, Tensor weight, Tensor? bias=None, Tensor? scales=None",
        "int stride=1, int groups=1, SymInt[2] trim=[0, 0], str pre='none'",
        _HISTORY, _conv_transpose, _conv_transpose_flops,
    ),
    "resblock": Op(
        "a SEANet residual unit: ELU, conv k3, ELU, conv k1, + input [-> activation]",
        "Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
        "Tensor? shortcut_weight=None, Tensor? shortcut_bias=None, Tensor? scales=None",
        "int dilation=1, SymInt[2] pad=[0, 0], str pad_mode='constant', str post='none'",
        _HISTORY, _resblock, _resblock_flops,
    ),
    "audio_resblock": Op(
        "the residual unit beside the audio and the convolution from or to the audio, of whole signals",
        "Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor audio_weight, Tensor audio_bias",
        "bool after=False, int dilation=1, str post='none'",
        "", _audio_resblock, _audio_resblock_flops,
        composed_of=("causal_conv1d", "resblock"),
    ),
    "window_attention": Op(
        "RoPE and causal attention over the last `window` positions, ring KV cache when streaming",
        "Tensor q, Tensor k, Tensor v, Tensor inv_freq",
        "int window, float rope_scale=1.0, bool interleaved=False",
        _RINGS, _attention, _attention_flops,
    ),
    "transformer_layer": Op(
        "norm, window attention, norm, feed-forward, each half scaled and added to its input",
        "Tensor x, Tensor norm1_weight, Tensor? norm1_bias, Tensor q, Tensor k, Tensor v, Tensor o, Tensor? scale1, "
        "Tensor norm2_weight, Tensor? norm2_bias, Tensor fc1, Tensor fc2, Tensor? scale2, Tensor inv_freq, "
        "Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? o_bias=None, Tensor? scales=None",
        "int window, float eps, str norm='layer', str activation='gelu', float rope_scale=1.0",
        _RINGS, _layer, _layer_flops, time=1,
        composed_of=("window_attention",),
    ),
    "rvq_encode": Op(
        "the residual chain of nearest-entry searches over all levels, in fp32",
        "Tensor x, Tensor codebooks",
        "", "", _encode, _encode_flops, time=1,
        differentiable=False,  # its result is integers
    ),
    "rvq_decode": Op(
        "sum over levels of the chosen codebook entries",
        "Tensor codes, Tensor codebooks",
        "ScalarType? dtype=None",
        "", _decode, _decode_flops, time=0,
    ),
}  # fmt: skip
