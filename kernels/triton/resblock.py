"""Triton kernel for `resblock`: ELU, convolution, ELU, 1 x 1 convolution and the skip connection in one launch.

    h = elu(b1 + w1 * elu(x))  [BLOCK_T, H]        y = b2 + w2 h + x

The hidden channels h never leave the chip: they are the accumulator of the first product and the left operand of the
second. Memory traffic per second of audio at 24 kHz with 64 channels in bf16, where one such tensor is 3.07 MB,
computed and not measured:

    | what runs                                  | bytes moved                                  | MB   |
    |--------------------------------------------|----------------------------------------------|------|
    | pad, ELU, conv, ELU, conv, + as six passes | 2 + 2 + 1.5 + 1 + 1.5 + 3 tensors            | 33.8 |
    | this kernel                                | x and y once                                 |  6.1 |
    | this and the strided convolution after it  | x, y twice, 1/4 of the times x 2 channels    | 10.7 |
    | both in one kernel                         | x, 1/4 of the times x 2 channels             |  4.6 |

At 16 kFLOP per sample it computes 0.39 GFLOP, 64 FLOP per byte: a fifth of the ratio of arithmetic to memory bandwidth
of an H100 by its data sheet (990 TFLOP/s to 3.35 TB/s). So it is limited by bandwidth.

Each element is loaded and activated once. The products of a tile with the three taps have a row for each time of the
tile; those of earlier taps are moved down by one and two times the dilation and added. So a tile needs the times before
its own, HALO = 2 * dilation rows that it computes and discards (of 128; a history stands for them in streams).

Fusing the strided convolution that follows would halve the traffic of the pair once more. But with a window of
2 * stride samples each tile would compute rows of its neighbour again, and the wider accumulators would make the tiles
shorter. It is left out until this kernel has been measured, as is the fusion with the transposed convolution before the
unit in the decoder. With more than `WIDEST` hidden channels, where arithmetic is the limit, the accumulators would
spill registers: `causal_conv1d` is launched twice instead, as for other kernels and for padding on the right.

A `shortcut` convolution (Mimi has none) is a launch of its own, whose result is added instead of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout
from ...runtime.arrivals import arrivals
from .._common import check_resblock
from . import _launch
from ._conv import (
    FEW_ROWS,
    LENGTHS,
    activate,
    advance_history,
    by_taps,
    load_either,
    mirrored_length,
    rows_of,
    segments,
    state_rows,
    time_in_signal,
)
from .causal_conv1d import causal_conv1d

TAPS = 3  # of the kernel below
WIDEST = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # hidden channels that fit in registers
WIDEST_AMD = 64


@triton.jit
def moved_down(x, rows, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Row i of the result is row i - rows of x [BLOCK_T, BLOCK_H]; the first ones are arbitrary."""
    i = tl.maximum(tl.arange(0, BLOCK_T) - rows, 0)
    return tl.gather(x, tl.broadcast_to(i[:, None], [BLOCK_T, BLOCK_H]), axis=0)


@triton.jit
def unit_of_tile(
    b_x, p_w1, p_b1, p_w2, p_b2, C, H, dilation,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b2 + w2 elu(b1 + w1 * elu(x)) + x for x [BLOCK_T, BLOCK_C] fp32 that has all C channels.

    Rows below 2 * dilation are arbitrary. Before each tap but the first, the sum so far is moved down by the dilation;
    three sums that are added in the end would need registers for all three.
    """
    dtype: tl.constexpr = p_w1.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float32
    c = tl.arange(0, BLOCK_C)
    h = tl.arange(0, BLOCK_H)
    m_w = (h < H)[:, None] & (c < C)[None, :]
    p_w = p_w1 + (h * (3 * C))[:, None] + c[None, :]  # [H, 3, C]
    b_e = activate(b_x, "elu", FINE).to(dtype)
    acc = tl.dot(b_e, tl.trans(tl.load(p_w, mask=m_w, other=0.0)), input_precision=PRECISION)
    for tap in tl.static_range(1, 3):
        acc = moved_down(acc, dilation, BLOCK_T, BLOCK_H)
        b_w = tl.load(p_w + tap * C, mask=m_w, other=0.0)
        acc = tl.dot(b_e, tl.trans(b_w), acc, input_precision=PRECISION)
    acc += tl.load(p_b1 + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    b_h = activate(acc, "elu", FINE).to(dtype)  # [BLOCK_T, BLOCK_H]
    b_w = tl.load(p_w2 + c[:, None] * H + h[None, :], mask=(c < C)[:, None] & (h < H)[None, :], other=0.0)
    b_y = b_x + tl.load(p_b2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return tl.dot(b_h, tl.trans(b_w), b_y, input_precision=PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def resblock_fwd_kernel(
    p_x, p_w1, p_b1, p_w2, p_b2, p_skip, p_history, p_first, p_active, p_state_rows, p_arrivals, p_y,
    B, T, C, H, dilation, pad, mirror, seg, per_tile, sx_b, sx_t, ss_b, ss_t, sy_b, sy_t, sh_b,
    POST: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, SELECT: tl.constexpr,
    SHARED: tl.constexpr, ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ONCE: x is the skip and its channels are one block, so that it is loaded once."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float32
    tile = tl.program_id(0)
    b, t, m_row, group = rows_of(tile, B, T, seg, per_tile, pad, SHARED, BLOCK_T)
    state = state_rows(p_state_rows, b, m_row, ROWS, SHARED)
    fresh = m_row
    if STREAM and MODE == "replicate":
        fresh = tl.load(p_first + state + tl.zeros_like(t), mask=m_row, other=0) != 0
    time = time_in_signal(t, T, mirror, fresh, MODE)
    p_rows = p_x + b * sx_b + time.to(tl.int64) * sx_t
    m_x = m_row & (time < T)
    p_past = p_history + state * sh_b + (pad + time) * C
    is_past = time < 0
    if not STREAM:
        m_x = m_x & (is_past == 0)
    h = tl.arange(0, BLOCK_H)
    m_h = (h < H)[:, None]
    p_weights = p_w1 + (h * (3 * C))[:, None]  # [H, 3, C]
    c = tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_T)
    m_y = m_row & ((i % (seg + pad) if SHARED else i) >= pad)
    t64 = t.to(tl.int64)
    p_skips = p_skip + b * ss_b + t64 * ss_t
    p_results = p_y + b * sy_b + t64 * sy_t
    if ONCE:
        m_c = (c < C)[None, :]
        if STREAM:
            b_x = load_either(
                is_past[:, None], p_past[:, None] + c[None, :], p_rows[:, None] + c[None, :], m_x[:, None] & m_c, SELECT
            )
        else:
            b_x = tl.load(p_rows[:, None] + c[None, :], mask=m_x[:, None] & m_c, other=0.0)
        b_y = unit_of_tile(
            b_x.to(tl.float32), p_w1, p_b1, p_w2, p_b2, C, H, dilation, BLOCK_T, BLOCK_H, BLOCK_C, PRECISION
        )
        tl.store(p_results[:, None] + c[None, :], activate(b_y, POST, FINE).to(dtype), mask=m_y[:, None] & m_c)
    else:
        first = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        second = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        third = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        for c0 in range(0, C, BLOCK_C):
            m_c = (c0 + c < C)[None, :]
            o_x = (c0 + c)[None, :]
            if STREAM:
                b_x = load_either(
                    is_past[:, None], p_past[:, None] + o_x, p_rows[:, None] + o_x, m_x[:, None] & m_c, SELECT
                )
            else:
                b_x = tl.load(p_rows[:, None] + o_x, mask=m_x[:, None] & m_c, other=0.0)
            b_e = activate(b_x.to(tl.float32), "elu", FINE).to(dtype)
            p_w = p_weights + o_x
            w1 = tl.trans(tl.load(p_w, mask=m_h & m_c, other=0.0))
            w2 = tl.trans(tl.load(p_w + C, mask=m_h & m_c, other=0.0))
            w3 = tl.trans(tl.load(p_w + 2 * C, mask=m_h & m_c, other=0.0))
            first = tl.dot(b_e, w1, first, input_precision=PRECISION)
            second = tl.dot(b_e, w2, second, input_precision=PRECISION)
            third = tl.dot(b_e, w3, third, input_precision=PRECISION)
        third += moved_down(second, dilation, BLOCK_T, BLOCK_H) + moved_down(first, 2 * dilation, BLOCK_T, BLOCK_H)
        third += tl.load(p_b1 + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        b_h = activate(third, "elu", FINE).to(dtype)  # [BLOCK_T, BLOCK_H]
        for c0 in range(0, C, BLOCK_C):
            o = c0 + c
            m_o = o < C
            b_w = tl.load(p_w2 + o[:, None] * H + h[None, :], mask=m_o[:, None] & (h < H)[None, :], other=0.0)
            b_y = tl.load(p_skips[:, None] + o[None, :], mask=m_y[:, None] & m_o[None, :], other=0.0).to(tl.float32)
            b_y += tl.load(p_b2 + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
            b_y = tl.dot(b_h, tl.trans(b_w), b_y, input_precision=PRECISION)
            b_y = activate(b_y, POST, FINE).to(dtype)
            tl.store(p_results[:, None] + o[None, :], b_y, mask=m_y[:, None] & m_o[None, :])
    if STREAM:
        advance_history(
            p_x, p_history, p_first, p_active, p_state_rows, p_arrivals, group, tl.cdiv(T, seg), B, per_tile,
            T, C, pad, sx_b, sx_t, sh_b, C, MODE, SELECT, ROWS, 1024,
        )  # fmt: skip


def resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, dilation: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", post: str = "none",
    shortcut_weight: Tensor | None = None, shortcut_bias: Tensor | None = None, scales: Tensor | None = None,
    history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_resblock(x, weight1, bias1, weight2, bias2, dilation, pad, history, rows)
    (batch, channels, length), (hidden, _, kernel) = x.shape, weight1.shape
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    tile = _blocks(batch * length, channels, hidden, x)
    halo = (TAPS - 1) * dilation
    widest = WIDEST_AMD if _launch.is_amd(x) else WIDEST[x.dtype]
    if kernel != TAPS or tuple(pad) != (halo, 0) or halo > tile["BLOCK_T"] // 2 or hidden > widest:
        hidden_channels = causal_conv1d(
            x, weight1, bias1, dilation=dilation, pad=pad, pad_mode=pad_mode, pre="elu", post="elu",
            history=history, first=first, active=active, rows=rows,
        )  # fmt: skip
        return causal_conv1d(hidden_channels, weight2, bias2, residual=skip, post=post)
    y = layout.empty_channels_last(x, channels, length)
    if not batch:
        return y
    seg, per_tile, groups, tiles = segments(batch, length, tile["BLOCK_T"], halo)
    stream = history is not None
    h: Any = history if stream else x
    f, a = (first, active) if stream else (x, x)
    by_name = stream and rows is not None
    _launch.launch(
        "resblock", resblock_fwd_kernel, (groups * tiles,),
        x, by_taps(weight1), bias1, weight2.contiguous(), bias2, skip, h, f, a, rows if by_name else x,
        arrivals(x, groups) if stream else x, y,
        batch, length, channels, hidden, dilation, halo, mirrored_length(length, pad, pad_mode), seg, per_tile,
        x.stride(0), x.stride(2), skip.stride(0), skip.stride(2), y.stride(0), y.stride(2), h.stride(0),
        POST=post, MODE=pad_mode, STREAM=stream, ROWS=by_name, SELECT=True, SHARED=per_tile > 1,
        ONCE=skip is x and tile["BLOCK_C"] >= channels,
        PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
    return y


def _blocks(rows: int, channels: int, hidden: int, x: Tensor) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for `rows` = B * T rows."""
    fp32 = x.dtype == torch.float32
    block_h = max(16, triton.next_power_of_2(hidden))
    block_t, warps, stages = 16 if rows <= FEW_ROWS else 64 if fp32 or block_h > 64 else 128, 4, 2
    if rows > FEW_ROWS and block_h > 32:
        warps = 8
    if rows > FEW_ROWS and not _launch.has_warp_groups(x):  # fewer registers are left
        block_t, warps, stages = block_t // 2, 8, 1
    return {
        "BLOCK_T": block_t, "BLOCK_H": block_h,
        "BLOCK_C": min(32 if fp32 else 64, max(16, triton.next_power_of_2(channels))),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
