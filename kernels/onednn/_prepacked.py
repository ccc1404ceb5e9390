"""Linear layers and convolutions with weights prepacked for oneDNN, through private operations of PyTorch.

PyTorch's public operations reorder the weights into oneDNN's layout at each call, and on some processors use MKL for
matrix products instead. For a step of a stream, which has few rows, that takes two to five times as long. The
operations used here are those that `torch.compile` uses for CPU models with frozen weights. Since they are private,
`unsupported` tries them out first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import layout, packing

DTYPES = (torch.float32, torch.bfloat16)
FUSED = {  # activations that oneDNN fuses into a linear layer: its names for the function and the algorithm
    "none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", ""),
    "silu": ("swish", ""), "tanh": ("tanh", ""),
}  # fmt: skip
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "elu": lambda x: F.elu(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
}
LONGEST_SUM = 1024  # terms of an fp32 sum: with more, the error of oneDNN is over twice that of PyTorch
SHORT_SUM = 256  # the same for a convolution, whose inputs, being activations, do not have zero mean
FEW_CHANNELS = 32
onednn = torch.ops.mkldnn


def unsupported(target: Any) -> str | None:
    """One sentence that says why this backend cannot run on the target (device and dtype), or None if it can."""
    if target.device != "cpu":
        return f"the oneDNN implementations run on a CPU, not on {target.device}"
    if target.dtype not in DTYPES:
        return f"the oneDNN implementations compute in float32 and bfloat16, not in {str(target.dtype)[6:]}"
    return refusal(target.dtype)


@cache
def refusal(dtype: torch.dtype) -> str | None:
    """Try the operations, and say in one sentence what is wrong with them; None if nothing is.

    Each may be missing from a build of PyTorch, or may not support a dtype on a processor.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            x, weight = torch.ones(1, 4, 16, dtype=dtype), torch.ones(16, 16, 2, dtype=dtype)
            short = torch.ones(16, 16, 1)
            wide = conv(x.transpose(1, 2), weight, None)  # [1, 16, 3] of 32
            same = conv(wide, short.to(dtype), None, residual=wide)  # of 32 * 16 + 32
            added = conv(wide, weight, None, residual=wide[..., 1:])  # [1, 16, 2] of 32 * 32 + 32
            fused = linear(x, prepack(short[..., 0].to(dtype), whole=True), post="gelu")  # [1, 4, 16] of 16
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this build of PyTorch, or this processor, refuses oneDNN's operations ({str(error).splitlines()[0]})"
    expected = ((same, (1, 16, 3), 544), (added, (1, 16, 2), 1056), (fused, (1, 4, 16), 16))
    right = all(y.shape == shape and bool((y == value).all()) for y, shape, value in expected)
    return None if right else "oneDNN's operations give wrong results in this build of PyTorch"


def prepack(weight: Tensor, *, whole: bool = False, min_parts: int = 1) -> list[Tensor]:
    """Prepack a weight [C_out, C] for `linear`.

    Unless it must stay `whole`, an fp32 weight is split along C into at least `min_parts` parts: `linear` adds up their
    products, which bounds the length of each sum.
    """
    count = 1 if whole or weight.dtype != torch.float32 else max(min_parts, round(weight.shape[1] / LONGEST_SUM))
    return [onednn._reorder_linear_weight(part.contiguous()) for part in weight.tensor_split(count, dim=1)]


def linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None = None, *, post: str = "none", residual: Tensor | None = None
) -> Tensor:
    """x [..., C] and a prepacked weight [C_out, C] -> [..., C_out], with the activation `post` or a residual.

    An activation needs a weight that was prepacked `whole`; the residual [..., C_out] is ignored with it.
    """
    if post != "none":
        (whole,), (activation, algorithm) = weight, FUSED[post]
        return onednn._linear_pointwise(x, whole, bias, activation, [], algorithm)
    return _sum_of_products(x.tensor_split(len(weight), dim=-1), weight, bias, residual)


def _sum_of_products(
    x_parts: Sequence[Tensor], weight_parts: list[Tensor], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    y = residual
    for x, weight in zip(x_parts, weight_parts, strict=True):
        if y is None:
            y = onednn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            y = onednn._linear_pointwise.binary(x, y, weight, bias, "add")
        bias = None  # added once
    assert y is not None
    return y


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve channels-last x [B, C, T] with a weight [C_out, C / groups, K] -> channels-last [B, C_out, T_out].

    The residual [B, C_out, T_out], if given, is added. Where oneDNN's convolution is inexact or wrong, the result is
    computed by linear layers over the windows of x.
    """
    kernel = weight.shape[2]
    residual = None if residual is None else layout.channels_last(residual)
    long_sums = stride > 1 or len(weight) == 1 or weight[0].numel() > LONGEST_SUM  # oneDNN's convolution is inexact
    # In bf16, oneDNN's strided convolutions of few channels are wrong on processors with AMX (PyTorch 2.6 to 2.14).
    as_linear = weight.dtype == torch.float32 or weight.shape[1] < FEW_CHANNELS
    if groups == 1 and (kernel == 1 or (long_sums and as_linear)):
        min_parts = 2 if weight[0].numel() > SHORT_SUM else 1
        length = (x.shape[2] - (kernel - 1) * dilation - 1) // stride + 1
        batch_step, _, step = x.stride()
        rows = x.as_strided((x.shape[0], length, kernel, x.shape[1]), (batch_step, stride * step, dilation * step, 1))
        by_taps = packing.packed(
            weight, "onednn by taps", lambda w: prepack(w.transpose(1, 2).flatten(1), min_parts=min_parts)
        )
        addend = None if residual is None else residual.transpose(1, 2)
        whole_taps = len(by_taps) == kernel > 1  # one part per tap: the overlapping windows need not be copied
        parts = rows.unbind(2) if whole_taps else rows.flatten(2).tensor_split(len(by_taps), dim=-1)
        return _sum_of_products(parts, by_taps, bias, addend).transpose(1, 2)
    geometry = [0, 0], [1, stride], [1, dilation], groups
    prepacked = packing.packed(
        weight, f"onednn {geometry}", lambda w: onednn._reorder_convolution_weight(w.unsqueeze(2), *geometry)
    )
    # With one channel or one time step, strides do not determine the layout, and PyTorch up to 2.11 fails to fuse the
    # addition.
    either_layout = residual is not None and 1 in residual.shape[1:]
    if residual is None or either_layout:
        y = onednn._convolution_pointwise(x.unsqueeze(2), prepacked, bias, *geometry, "none", [], "")
    else:
        y = onednn._convolution_pointwise.binary(
            x.unsqueeze(2), residual.unsqueeze(2), prepacked, bias, *geometry, "add", None, None, [], None
        )
    y = layout.channels_last(y.squeeze(2))
    return y + residual if residual is not None and either_layout else y


def padded(
    x: Tensor,  # [B, C, T]
    pad: tuple[int, int],
    pad_mode: str = "constant",
    pre: str = "none",
    history: Tensor | None = None,  # [B, pad[0], C], mutated
    first: Tensor | None = None,  # [B] bool
    active: Tensor | None = None,  # [B] bool
    rows: Tensor | None = None,  # [B] int64: rows of a pool's state
) -> Tensor:  # [B, C, pad[0] + T + pad[1]], activated, channels-last
    """The input of a convolution: x with its left padding or history and its right padding, then the activation `pre`.

    The history is updated in place for the active rows.
    """
    if pad == (0, 0) and pre == "none":
        return layout.channels_last(x)
    (left, right), length = pad, x.shape[2]
    y = layout.empty_channels_last(x, x.shape[1], left + length + right)
    y[..., left : left + length] = x
    if history is not None and left:
        assert first is not None and active is not None, "a history needs `first` and `active`"
        pool = history
        if rows is not None:
            history, first, active = history[rows], first[rows], active[rows]
        begins = first[:, None, None] & (pad_mode == "replicate")
        y[..., :left] = torch.where(begins, x[..., :1], history.mT)
        new = torch.where(active[:, None, None], y[..., length : length + left].mT, history)
        pool[... if rows is None else rows] = new
        left = 0
    known = y[..., left : y.shape[2] - right]
    if left:
        y[..., :left] = _edge(known, torch.arange(-left, 0), max(left, right), pad_mode)
    if right:
        end = known.shape[2]
        y[..., left + end :] = _edge(known, torch.arange(end, end + right), max(left, right), pad_mode)
    return IN_PLACE[pre](y)


def _edge(known: Tensor, positions: Tensor, reach: int, pad_mode: str) -> Tensor | float:
    """The padding of a signal [B, C, T] at positions [P] outside it.

    For 'reflect', a signal with no more than `reach` samples is first extended with zeros on the right.
    """
    if pad_mode == "constant":
        return 0.0
    last = known.shape[2] - 1
    if pad_mode == "replicate":
        return known[..., positions.clamp(0, last)]
    mirror = max(last, reach)
    positions = mirror - (mirror - positions.abs()).abs()
    return known[..., positions.clamp(max=last)].masked_fill(positions > last, 0)
