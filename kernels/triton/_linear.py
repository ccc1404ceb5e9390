"""The product of few rows with a weight, and what surrounds it in a transformer layer, as one tile of a program.

    y = residual + scale * post(pre(x) w^T + bias)        pre: none or a norm, post: none or an activation

A tile is some rows and some outputs over the whole sum, so that results do not depend on the order in which programs
run. Each tile normalises its rows anew: for 16 rows that is 16 KB from the L2 cache, as much as its part of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def linear_tile(
    tile, p_x, p_w, p_y, p_norm_weight, p_norm_bias, p_bias, p_scale, p_residual, R, units, O, eps,
    PRE: tl.constexpr, POST: tl.constexpr, NORM_BIAS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y [R, O] = residual + scale * post(pre(x) [R, C] w [O, C] + bias), all rows contiguous."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    C = units * UNIT  # tells the compiler what divides the beginning of a row
    columns = tl.cdiv(O, BLOCK_O)
    r = (tile // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile % columns * BLOCK_O + tl.arange(0, BLOCK_O)
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
