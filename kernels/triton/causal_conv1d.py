"""Triton kernel for `causal_conv1d`: activation, convolution, bias, activation and residual in one launch.

    y[b, t, o] = post(bias[o] + sum_{k, c} w[o, k, c] * pre(x)[b, t * stride + k * dilation - pad, c]) + r[b, t, o]

The sum is computed by `_conv.convolve`. When streaming, the same launch also reads the history, and the last program of
each group of batch rows to arrive updates it.

Memory traffic, computed and not measured: the first strided convolution of the encoder (64 to 128 channels, stride 4)
reads x and writes y, which is half as large, 1.5 tensors of the size of x. With padding and activation as separate
operations, which read and write x once more each, it would be 5.5.

The output is channels-last; an input that is not is copied. Groups are launched one after another (Mimi has no grouped
`causal_conv1d`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout
from .._common import conv_length
from . import _launch
from ._conv import (
    LENGTHS,
    activate,
    advance_history,
    blocks,
    by_taps,
    convolve,
    mirrored_length,
    rows_of,
    segments,
)


@triton.jit(do_not_specialize=LENGTHS)
def causal_conv1d_fwd_kernel(
    p_x, p_w, p_bias, p_residual, p_history, p_first, p_active, p_arrivals, p_y,
    B, T, T_out, C, O, K, stride, dilation, pad, mirror, seg, per_tile,
    sx_b, sx_t, sr_b, sr_t, sy_b, sy_t, sh_b,
    PRE: tl.constexpr, POST: tl.constexpr, MODE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    STREAM: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_y.dtype.element_ty
    columns = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // columns
    o = (tl.program_id(0) % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, t, m_row, group = rows_of(tile, B, T_out, seg, per_tile, BLOCK_T)
    fresh = m_row
    if STREAM and MODE == "replicate":
        fresh = tl.load(p_first + b, mask=m_row, other=0) != 0
    acc = convolve(
        p_x, p_history, p_w, b, t, m_row, fresh, o,
        T, C, O, K, stride, dilation, pad, mirror, sx_b, sx_t, sh_b,
        PRE, MODE, STREAM, BLOCK_T, BLOCK_O, BLOCK_C, TAPS, PRECISION,
    )  # fmt: skip
    m_o = o < O
    m_y = m_row[:, None] & m_o[None, :]
    if BIAS:
        acc += tl.load(p_bias + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, POST, dtype == tl.float32)
    t64 = t.to(tl.int64)
    if RESIDUAL:
        p_r = p_residual + (b * sr_b + t64 * sr_t)[:, None] + o[None, :]
        acc += tl.load(p_r, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + (b * sy_b + t64 * sy_t)[:, None] + o[None, :], acc.to(dtype), mask=m_y)
    if STREAM:
        advance_history(
            p_x, p_history, p_first, p_active, p_arrivals, tile, group, tl.cdiv(T_out, seg) * columns, B, per_tile,
            T, C, pad, sx_b, sx_t, sh_b, MODE, 64, BLOCK_P,
        )  # fmt: skip


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", pre: str = "none", post: str = "none",
    residual: Tensor | None = None, scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    total = conv_length(x, weight, bias, stride, dilation, groups, pad, history)
    x, y = layout.channels_last(x), layout.empty_channels_last(x, len(weight), total)
    residual = None if residual is None else layout.channels_last(residual)
    if not len(x):
        return y
    for g in range(groups):
        px, pw, pb, pr, ph, py = (
            t if t is None or groups == 1 else t.chunk(groups, dim)[g]
            for t, dim in ((x, 1), (weight, 0), (bias, 0), (residual, 1), (history, 1), (y, 1))
        )
        _launch_group(px, pw, pb, pr, ph, first, active, py, stride, dilation, pad, pad_mode, pre, post)
    return y


def _launch_group(x, weight, bias, residual, history, first, active, y, stride, dilation, pad, pad_mode, pre, post):
    """Compute one group into its channels of y."""
    (batch, channels, length), (out, _, kernel), total = x.shape, weight.shape, y.shape[2]
    weight = by_taps(weight)
    stream = history is not None and pad[0] > 0
    tile = blocks(batch * total, channels, out, kernel, x, stream)
    seg, per_tile, groups_of_rows, tiles = segments(batch, total, tile["BLOCK_T"])
    r = y if residual is None else residual
    h, f, a = (history, first, active) if stream else (x, x, x)
    counters = _launch.arrivals(x, groups_of_rows) if stream else x
    _launch.launch(
        "causal_conv1d", causal_conv1d_fwd_kernel, (groups_of_rows * tiles * triton.cdiv(out, tile["BLOCK_O"]),),
        x, weight, weight if bias is None else bias, r, h, f, a, counters, y,
        batch, length, total, channels, out, kernel, stride, dilation, pad[0],
        mirrored_length(length, pad, pad_mode), seg, per_tile,
        x.stride(0), x.stride(2), r.stride(0), r.stride(2), y.stride(0), y.stride(2), h.stride(0),
        PRE=pre, POST=post, MODE=pad_mode, BIAS=bias is not None, RESIDUAL=residual is not None, STREAM=stream,
        BLOCK_P=triton.next_power_of_2(pad[0]) if stream else 1, PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
