"""Triton kernel for `causal_conv1d`: activation, convolution, bias, residual and activation in one launch.

    y[b, t, o] = post(bias[o] + sum_{k, c} w[o, k, c] * pre(x)[b, t * stride + k * dilation - pad, c] + r[b, t, o])

The sum is computed by `_conv.convolve`. When streaming, the same launch also reads the history, and the last program of
each group of batch rows to arrive updates it.

`post` is applied once per element; `pre` once per element, tap and tile of outputs, which takes longer than the product
itself. So the models ask for the activation where its input is made.

Memory traffic, computed and not measured: the first strided convolution of the encoder (64 to 128 channels, stride 4)
reads x and writes y, which is half as large, 1.5 tensors of the size of x. With padding and activation as separate
operations, which read and write x once more each, it would be 5.5.

The output is channels-last; an input that is not is copied. Groups are launched one after another (Mimi has no grouped
`causal_conv1d`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout
from ...runtime.arrivals import arrivals
from .._common import conv_length
from . import _launch
from ._conv import (
    LENGTHS,
    activate,
    advance_history,
    blocks,
    by_taps,
    channels_of,
    convolve,
    mirrored_length,
    rows_of,
    segments,
    state_rows,
)


@triton.jit(do_not_specialize=LENGTHS)
def causal_conv1d_fwd_kernel(
    p_x, p_w, p_bias, p_residual, p_history, p_first, p_active, p_state_rows, p_arrivals, p_sums, p_y,
    B, T, T_out, C, O, K, stride, dilation, pad, mirror, seg, per_tile, groups,
    sx_b, sx_t, sr_b, sr_t, sy_b, sy_t, sh_b, sh_t,
    PRE: tl.constexpr, POST: tl.constexpr, MODE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    STREAM: tl.constexpr, ROWS: tl.constexpr, SELECT: tl.constexpr, SHARED: tl.constexpr, FLAT: tl.constexpr,
    EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_y.dtype.element_ty
    columns = tl.cdiv(O, BLOCK_O)
    part = tl.program_id(0) // SPLITS  # of the output
    split = tl.program_id(0) % SPLITS
    o = (part % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, t, m_row, group = rows_of(part // columns, B, T_out, seg, per_tile, 0, SHARED, BLOCK_T)
    state = state_rows(p_state_rows, b, m_row, ROWS, SHARED)
    fresh = m_row
    if STREAM and MODE == "replicate":
        fresh = tl.load(p_first + state + tl.zeros_like(t), mask=m_row, other=0) != 0
    r_start = 0
    r_stop = K * C
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(K * C, BLOCK_R), SPLITS) * BLOCK_R
        r_start = split * share
        r_stop = tl.minimum(r_start + share, K * C)
    acc = convolve(
        p_x, p_history, p_w, b, state, t, m_row, fresh, o, r_start, r_stop,
        T, C, O, K, stride, dilation, pad, mirror, sx_b, sx_t, sh_b, sh_t,
        PRE, MODE, STREAM, SELECT, FLAT, EVEN, BLOCK_T, BLOCK_O, BLOCK_R, PRECISION,
    )  # fmt: skip
    if SPLITS > 1:
        i = tl.arange(0, BLOCK_T)[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
        p_sum = p_sums + part.to(tl.int64) * (SPLITS * BLOCK_T * BLOCK_O) + i
        tl.store(p_sum + split * (BLOCK_T * BLOCK_O), acc)
        tl.debug_barrier()  # all threads have stored their sums
        p_arrived = p_arrivals + groups + part
        if tl.atomic_add(p_arrived, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(p_arrived, 0)
        acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        for s in range(SPLITS):
            acc += tl.load(p_sum + s * (BLOCK_T * BLOCK_O), cache_modifier=".cg")
    m_o = o < O
    m_y = m_row[:, None] & m_o[None, :]
    if BIAS:
        acc += tl.load(p_bias + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    t64 = t.to(tl.int64)
    if RESIDUAL:
        p_r = p_residual + (b * sr_b + t64 * sr_t)[:, None] + o[None, :]
        acc += tl.load(p_r, mask=m_y, other=0.0).to(tl.float32)
    acc = activate(acc, POST, dtype == tl.float32)
    tl.store(p_y + (b * sy_b + t64 * sy_t)[:, None] + o[None, :], acc.to(dtype), mask=m_y)
    if STREAM:
        advance_history(
            p_x, p_history, p_first, p_active, p_state_rows, p_arrivals, group, tl.cdiv(T_out, seg) * columns, B,
            per_tile, T, C, pad, sx_b, sx_t, sh_b, sh_t, MODE, SELECT, ROWS, 1024,
        )  # fmt: skip


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", pre: str = "none", post: str = "none",
    residual: Tensor | None = None, scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    total = conv_length(x, weight, bias, stride, dilation, groups, pad, history, rows)
    x, y = layout.channels_last(x), layout.empty_channels_last(x, len(weight), total)
    residual = None if residual is None else layout.channels_last(residual)
    if not len(x):
        return y
    tensors = ((x, 1), (by_taps(weight), 0), (bias, 0), (residual, 1), (history, 2), (y, 1))
    for g in range(groups):
        px, pw, pb, pr, ph, py = (channels_of(t, dim, g, groups) for t, dim in tensors)
        launch_group(px, pw, pb, pr, ph, first, active, rows, py, stride, dilation, pad, pad_mode, pre, post)
    return y


def launch_group(
    x, weight, bias, residual, history, first, active, rows, y, stride=1, dilation=1, pad=(0, 0),
    pad_mode="constant", pre="none", post="none",
):  # fmt: skip
    """Compute one group into its channels of y; the weight is [C_out, K, C]."""
    (batch, channels, length), (out, kernel, _), total = x.shape, weight.shape, y.shape[2]
    stream = history is not None and pad[0] > 0
    h_t = history.stride(1) if stream else channels
    flat = (dilation == 1 or kernel == 1) and pad_mode == "constant" and x.stride(2) == h_t == channels
    tile = blocks(batch * total, channels, out, kernel, x, flat, flat and not stream and residual is None)
    seg, per_tile, groups_of_rows, tiles = segments(batch, total, tile["BLOCK_T"])
    parts, splits = groups_of_rows * tiles * triton.cdiv(out, tile["BLOCK_O"]), tile["SPLITS"]
    r, sums = y if residual is None else residual, x
    h, f, a = (history, first, active) if stream else (x, x, x)
    by_name = stream and rows is not None
    counters = arrivals(x, groups_of_rows + parts * (splits > 1)) if stream or splits > 1 else x
    if splits > 1:
        sums = x.new_empty(parts, splits, tile["BLOCK_T"], tile["BLOCK_O"], dtype=torch.float32)
    _launch.launch(
        "causal_conv1d", causal_conv1d_fwd_kernel, (parts * splits,),
        x, weight, weight if bias is None else bias, r, h, f, a, rows if by_name else x, counters, sums, y,
        batch, length, total, channels, out, kernel, stride, dilation, pad[0],
        mirrored_length(length, pad, pad_mode), seg, per_tile, groups_of_rows,
        x.stride(0), x.stride(2), r.stride(0), r.stride(2), y.stride(0), y.stride(2), h.stride(0), h_t,
        PRE=pre, POST=post, MODE=pad_mode, BIAS=bias is not None, RESIDUAL=residual is not None,
        STREAM=stream, ROWS=by_name, SELECT=True, SHARED=per_tile > 1,
        FLAT=flat, EVEN=channels % tile["BLOCK_R"] == 0,
        PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
