"""Triton kernels for `transformer_layer`: five launches for few rows, PyTorch's products for many.

    y   = x + scale1 * o(attention(q(n), k(n), v(n))),    n = norm1(x)
    out = y + scale2 * fc2(activation(fc1(norm2(y))))

A frame of a stream is limited by reading the weights: 6.3 MB in bf16 for 512 channels and 2048 hidden ones, 2.1 us at 3
TB/s. Composed of PyTorch's operations, a layer is 14 launches, each longer than its share of that. With at most
`FEW` rows it is five:

    norm + q, k, v | RoPE + attention + ring | o + scale + residual | norm + fc1 + activation | fc2 + scale + residual

One kernel is four of them: a product of normalised rows with a weight, and all that follows it. A program takes a tile
of rows and a tile of outputs over the whole sum, so that results do not depend on the order in which programs run.
Each program normalises its rows anew: for 16 rows that is 16 KB from the L2 cache, as much as its tile of the weight.

Attention and the product with `o` are two launches. In one, either each program would attend to all heads, 512 KB of
rings for 16 outputs, or heads would add partial products [rows, 512] in fp32, which atomically has no fixed order, and
through memory is 16 KB a row that each program of the next launch would read.

With many rows, PyTorch's products (cuBLAS) are faster than these tiles, which read the weights again for each tile of
rows. The bound `FEW` follows from counted bytes of the L2 cache and has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing
from .._common import check_norm, normalized, stacked_bias
from . import _launch
from .window_attention import window_attention

FEW = 512  # rows, positions of all streams together
CHUNK = 8192  # elements of rows that a program holds while it computes their mean and variance
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@triton.jit
def tanh(x):
    z = x * x
    near = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of fp32 x; NaN stays NaN."""
    if KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif KIND == "tanh":
        x = tanh(x)
    return x


@triton.jit
def statistics(p_rows, m_row, C, eps, KIND: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr):
    """Mean (0 for an RMSNorm) and reciprocal standard deviation of rows [BLOCK_T, C]; WHOLE: C is at most CHUNK."""
    n = tl.arange(0, CHUNK)
    end = CHUNK if WHOLE else C
    mean = tl.zeros_like(m_row).to(tl.float32)
    if KIND == "layer":
        for n0 in range(0, end, CHUNK):
            b_x = tl.load(p_rows + (n0 + n)[None, :], mask=m_row[:, None] & (n0 + n < C)[None, :], other=0.0)
            mean += tl.sum(b_x.to(tl.float32), axis=1)
        mean = mean / C
    squares = tl.zeros_like(mean)
    for n0 in range(0, end, CHUNK):
        b_x = tl.load(p_rows + (n0 + n)[None, :], mask=m_row[:, None] & (n0 + n < C)[None, :], other=0.0)
        gap = tl.where((n0 + n < C)[None, :], b_x.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(gap * gap, axis=1)
    return mean, tl.rsqrt(squares / C + eps)


@triton.jit(do_not_specialize=["R"])
def transformer_layer_linear_kernel(
    p_x, p_w, p_y, p_norm_weight, p_norm_bias, p_bias, p_scale, p_residual, R, units, O, eps,
    PRE: tl.constexpr, POST: tl.constexpr, NORM_BIAS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [R, O] = residual + scale * post(pre(x) [R, C] w [O, C] + bias), all rows contiguous."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    C = units * UNIT  # tells the compiler what divides the beginning of a row
    columns = tl.cdiv(O, BLOCK_O)
    r = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(0) % columns * BLOCK_O + tl.arange(0, BLOCK_O)
    m_row, m_o = r < R, o < O
    p_rows, p_weights = p_x + r[:, None] * C, p_w + o[:, None].to(tl.int64) * C
    if PRE != "none":
        mean, factor = statistics(p_rows, m_row, C, eps, PRE, WHOLE, CHUNK)
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        m_c = c < C
        b_x = tl.load(p_rows + c[None, :], mask=m_row[:, None] & m_c[None, :], other=0.0)
        if PRE != "none":
            weight = tl.load(p_norm_weight + c, mask=m_c, other=0.0).to(tl.float32)
            b_n = (b_x.to(tl.float32) - mean[:, None]) * factor[:, None] * weight[None, :]
            if NORM_BIAS:
                b_n += tl.load(p_norm_bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            b_x = b_n.to(dtype)
        b_w = tl.load(p_weights + c[None, :], mask=m_o[:, None] & m_c[None, :], other=0.0).to(dtype)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(p_bias + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, POST)
    if SCALE:
        acc *= tl.load(p_scale + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    m_y, o_y = m_row[:, None] & m_o[None, :], r[:, None] * O + o[None, :]
    if RESIDUAL:
        acc += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, acc.to(dtype), mask=m_y)


class Norm(NamedTuple):
    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


def transformer_layer(
    x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    scale1: Tensor | None, norm2_weight: Tensor, norm2_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale2: Tensor | None, inv_freq: Tensor, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    v_bias: Tensor | None = None, o_bias: Tensor | None = None, scales: Tensor | None = None, *, window: int,
    eps: float, norm: str = "layer", activation: str = "gelu", rope_scale: float = 1.0, offset: Tensor | None = None,
    cache_k: Tensor | None = None, cache_v: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference."""
    check_norm(norm, norm1_bias, norm2_bias)
    if not x.numel():
        return torch.empty_like(x)
    x = x.contiguous()
    linear = _few if x.shape[0] * x.shape[1] <= FEW else _many
    qkv, qkv_bias = packing.packed((q, k, v, q_bias, k_bias, v_bias), "triton q, k, v", _stacked)
    dim = 2 * len(inv_freq)
    heads = linear(x, qkv, Norm(norm, norm1_weight, norm1_bias, eps), bias=qkv_bias).unflatten(-1, (-1, dim))
    q_heads, k_heads, v_heads = heads.transpose(1, 2).split([len(weight) // dim for weight in (q, k, v)], dim=1)
    y = window_attention(
        q_heads, k_heads, v_heads, inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active, rows=rows,
    )  # fmt: skip
    x = linear(y.transpose(1, 2).flatten(-2), o, bias=o_bias, scale=scale1, residual=x)
    hidden = linear(x, fc1, Norm(norm, norm2_weight, norm2_bias, eps), activation=activation)
    return linear(hidden, fc2, scale=scale2, residual=x)


def _stacked(
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return torch.cat([q, k, v]), stacked_bias((q, k, v), (q_bias, k_bias, v_bias))


def _many(
    x: Tensor, weight: Tensor, norm: Norm | None = None, *, bias: Tensor | None = None, activation: str = "none",
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + scale * activation(norm(x) [B, T, C] weight [O, C] + bias), by PyTorch."""
    if norm is not None:
        x = normalized(x, norm.weight, norm.bias, norm.eps, norm.kind)
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    if residual is None:
        return y
    return residual + y if scale is None else torch.addcmul(residual, y, scale)


def _few(
    x: Tensor, weight: Tensor, norm: Norm | None = None, *, bias: Tensor | None = None, activation: str = "none",
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in one launch; x and residual are contiguous."""
    (batch, length, channels), outputs = x.shape, len(weight)
    y, weight = x.new_empty(batch, length, outputs), weight.contiguous()
    kind, norm_weight, norm_bias, eps = norm or Norm("none", x, None, 0.0)
    tile, unit = _blocks(batch * length, x), math.gcd(channels, 16)
    chunk, most = triton.next_power_of_2(channels), CHUNK // tile["BLOCK_T"]
    if chunk > most:
        chunk = most // 2  # read in turns, with the next in flight
    _launch.launch(
        "transformer_layer", transformer_layer_linear_kernel,
        (triton.cdiv(batch * length, tile["BLOCK_T"]) * triton.cdiv(outputs, tile["BLOCK_O"]),),
        x, weight, y, norm_weight, *(x if t is None else t for t in (norm_bias, bias, scale, residual)),
        batch * length, channels // unit, outputs, eps,
        PRE=kind, POST=activation, NORM_BIAS=norm_bias is not None, BIAS=bias is not None, SCALE=scale is not None,
        RESIDUAL=residual is not None, UNIT=unit, WHOLE=channels <= chunk, CHUNK=chunk,
        PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
    return y


def _blocks(rows: int, x: Tensor) -> dict[str, int]:
    """Tiles for so many rows that spill no registers: with few rows small ones, so that many programs read weights."""
    fp32 = x.dtype == torch.float32
    if rows <= 16:
        tile = {"BLOCK_T": 16, "BLOCK_O": 16, "BLOCK_C": 64 if fp32 else 256}
    elif rows <= 64:
        tile = {"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_C": 32 if fp32 else 256}
    elif rows <= 256:
        tile = {"BLOCK_T": 32, "BLOCK_O": 32, "BLOCK_C": 32 if fp32 else 128}
    else:
        tile = {"BLOCK_T": 64, "BLOCK_O": 32 if fp32 else 64, "BLOCK_C": 32 if fp32 else 64}
    return {**tile, "num_warps": 8 if fp32 and rows > 256 else 4, "num_stages": 4}
