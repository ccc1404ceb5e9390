"""What every backend does alike: checks of arguments, lengths of results, transposed convolutions as convolutions.

Checks raise ValueError for shapes that do not fit together; the models of fastmimi pass none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import lengths


def conv_length(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int, pad: tuple[int, int],
    history: Tensor | None, rows: Tensor | None,
) -> int:  # fmt: skip
    """Check a convolution of x [B, C, T] with weight [C_out, C / groups, K], and return T_out."""
    _check_channels(x, weight.shape[1] * groups, len(weight), bias)
    length = lengths.convolved(x.shape[2], weight.shape[2], stride, dilation, pad)
    if length < 1:
        span = (weight.shape[2] - 1) * dilation + 1
        raise ValueError(f"x and its padding must span the kernel's {span} samples, got {x.shape[2]} + {sum(pad)}")
    if history is not None:
        check_state("history", history, (len(x), pad[0], x.shape[1]), rows)
    return length


def conv_transpose_length(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, trim: tuple[int, int],
    history: Tensor | None, rows: Tensor | None,
) -> int:  # fmt: skip
    """Check a transposed convolution of x [B, C, T] with weight [C, C_out / groups, K], and return T_out."""
    outputs, kernel = weight.shape[1] * groups, weight.shape[2]
    _check_channels(x, len(weight), outputs, bias)
    if history is not None:
        check_state("history", history, (len(x), taps_of(kernel, stride) - 1, x.shape[1]), rows)
        return x.shape[2] * stride
    length = lengths.upsampled(x.shape[2], kernel, stride, trim)
    if length < 0 or trim[0] < 0:
        whole = length + sum(trim)
        raise ValueError(f"trim must leave some of the {whole} samples of the whole result, got {tuple(trim)}")
    return length


def check_resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dilation: int, pad: tuple[int, int],
    history: Tensor | None, rows: Tensor | None,
) -> None:  # fmt: skip
    """Check a residual unit of x [B, C, T] with weights [H, C, K] and [C, H, 1], which keeps the length."""
    length = conv_length(x, weight1, bias1, 1, dilation, 1, pad, history, rows)
    if weight2.shape != (x.shape[1], len(weight1), 1):
        raise ValueError(f"weight2 must be [{x.shape[1]}, {len(weight1)}, 1], got {tuple(weight2.shape)}")
    _check_channels(x, len(weight2), len(weight2), bias2)
    if length != x.shape[2]:
        raise ValueError(f"the padding must keep the length {x.shape[2]}, got {length}")


def check_audio_resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, audio_weight: Tensor,
    audio_bias: Tensor, after: bool, dilation: int,
) -> None:  # fmt: skip
    """Check a residual unit and the convolution before or, with `after`, after it; both keep the length."""
    conv_length(x, audio_weight, audio_bias, 1, 1, 1, (audio_weight.shape[2] - 1, 0), None, None)
    inner = x if after else x[:, :1].expand(-1, len(audio_weight), -1)  # of the shape of the unit's input
    left = (weight1.shape[2] - 1) * dilation
    check_resblock(inner, weight1, bias1, weight2, bias2, dilation, (left, 0), None, None)


def _check_channels(x: Tensor, channels: int, outputs: int, bias: Tensor | None) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"x must have the {channels} channels of the weight, got {x.shape[1]}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},), got {tuple(bias.shape)}")


def check_state(name: str, state: Tensor, shape: tuple[int, ...], rows: Tensor | None) -> None:
    """Check that a tensor of streaming state is contiguous and has the given shape [B, ...].

    A pool's has any number of rows, of which `rows` [B] names those of this batch; values on a GPU are not read.
    """
    if rows is not None:
        if rows.dtype != torch.int64 or rows.shape != shape[:1] or not rows.is_contiguous():
            raise ValueError(f"rows must be int64, contiguous and {shape[:1]}, got {rows.dtype} {tuple(rows.shape)}")
        if rows.is_cpu and not all(0 <= row < len(state) for row in rows.tolist()):
            raise IndexError(f"rows must lie in [0, {len(state)}), got {rows.tolist()}")
        shape = (len(state), *shape[1:])
    if state.shape != shape or not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous and {shape}, got {tuple(state.shape)}")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, cache_k: Tensor | None, cache_v: Tensor | None, rows: Tensor | None
) -> None:
    """Check q [B, H, T, D], k and v [B, H_kv, T, D], and rings [B, H_kv, window, D]."""
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    if heads % kv_heads or k.shape != v.shape or k.shape != (batch, kv_heads, length, dim):
        raise ValueError(f"the shapes of q, k and v do not match: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        if cache is not None:
            check_state(name, cache, (batch, kv_heads, window, dim), rows)


def check_search(x: Tensor, codebooks: Tensor) -> None:
    """Check x [N, D] and codebooks [L, S, D]."""
    if x.dim() != 2 or x.shape[1] != codebooks.shape[2]:
        raise ValueError(f"x must be [N, {codebooks.shape[2]}], like the codebook entries, got {tuple(x.shape)}")


def check_codes(codes: Tensor, codebooks: Tensor) -> None:
    """Check codes [L, N] int64 for codebooks [at least L, S, D]; their values on a CPU only, where they are at hand.

    Raises TypeError for another dtype, and IndexError for values outside [0, S).
    """
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be int64, got {codes.dtype}")
    if len(codes) > len(codebooks):
        raise ValueError(f"codes of {len(codes)} levels need as many codebooks, got {len(codebooks)}")
    size = codebooks.shape[1]
    if codes.is_cpu and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise IndexError(f"codes must lie in [0, {size}), got {int(codes.min())} to {int(codes.max())}")


def check_norm(norm: str, *biases: Tensor | None) -> None:
    """Check that an RMSNorm has no bias."""
    if norm == "rms" and any(bias is not None for bias in biases):
        raise ValueError("an RMSNorm has no bias, got one")


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    """LayerNorm, or RMSNorm, over the last dimension of x [..., C], by PyTorch."""
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def stacked_bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases [C_out] of linear layers, one after the other, 0 where a layer has none; None if none has."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])


def taps_of(kernel: int, stride: int) -> int:
    """How many inputs each output of a transposed convolution is a sum over, at most."""
    return -(-kernel // stride)


def as_convolution(weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """[C, C_out / groups, K] -> [groups * stride * C_out / groups, C / groups, taps]: a convolution with stride 1.

    Its outputs (group, j, o) at time t are the transposed convolution's at times t * stride + j. The first tap
    multiplies the oldest input; the weight is zero-padded beyond K.
    """
    weight = F.pad(weight, (0, -weight.shape[2] % stride)).unflatten(2, (-1, stride)).flip(2)
    weight = weight.unflatten(0, (groups, -1))  # [groups, C / groups, C_out / groups, taps, stride]
    return weight.permute(0, 4, 2, 1, 3).flatten(0, 2).contiguous()


def in_the_rings_dtype(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a `window_attention` compute in the dtype of its rings where q, k and v have a narrower one, by autocast."""

    @wraps(attention)
    def wrapped(
        q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, cache_k: Tensor | None = None, **options: object
    ) -> Tensor:
        if cache_k is None or cache_k.dtype == q.dtype:
            return attention(q, k, v, inv_freq, cache_k=cache_k, **options)
        return attention(*(x.to(cache_k.dtype) for x in (q, k, v)), inv_freq, cache_k=cache_k, **options).to(q.dtype)

    return wrapped
