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

Fusing the strided convolution that follows would halve the traffic of the pair once more. But with a window of
2 * stride samples each tile would compute rows of its neighbour again, and the wider accumulators would make the tiles
shorter. It is left out until this kernel has been measured, as is the fusion with the transposed convolution before the
unit in the decoder. With more than `WIDEST` hidden channels, where arithmetic is the limit, the accumulator would spill
registers: `causal_conv1d` is launched twice instead.

A `shortcut` convolution (Mimi has none) is a launch of its own, whose result is added instead of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout
from .._common import check_resblock
from . import _launch
from ._conv import (
    LENGTHS,
    activate,
    advance_history,
    by_taps,
    convolve,
    mirrored_length,
    rows_of,
    segments,
)
from .causal_conv1d import causal_conv1d

WIDEST = {torch.float32: 64, torch.float16: 256, torch.bfloat16: 256}  # hidden channels that fit in registers


@triton.jit(do_not_specialize=LENGTHS)
def resblock_fwd_kernel(
    p_x, p_w1, p_b1, p_w2, p_b2, p_skip, p_history, p_first, p_active, p_arrivals, p_y,
    B, T, C, H, K, dilation, pad, mirror, seg, per_tile,
    sx_b, sx_t, ss_b, ss_t, sy_b, sy_t, sh_b,
    MODE: tl.constexpr, STREAM: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_y.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float32
    tile = tl.program_id(0)
    b, t, m_row, group = rows_of(tile, B, T, seg, per_tile, BLOCK_T)
    fresh = m_row
    if STREAM and MODE == "replicate":
        fresh = tl.load(p_first + b, mask=m_row, other=0) != 0
    h = tl.arange(0, BLOCK_H)
    acc = convolve(
        p_x, p_history, p_w1, b, t, m_row, fresh, h,
        T, C, H, K, 1, dilation, pad, mirror, sx_b, sx_t, sh_b,
        "elu", MODE, STREAM, BLOCK_T, BLOCK_H, BLOCK_C, TAPS, PRECISION,
    )  # fmt: skip
    acc += tl.load(p_b1 + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    b_h = activate(acc, "elu", FINE).to(dtype)  # [BLOCK_T, BLOCK_H]
    t64 = t.to(tl.int64)
    p_skips = p_skip + b * ss_b + t64 * ss_t
    p_rows = p_y + b * sy_b + t64 * sy_t
    for o0 in range(0, C, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        m_o = o < C
        m_y = m_row[:, None] & m_o[None, :]
        b_w = tl.load(p_w2 + o[:, None] * H + h[None, :], mask=m_o[:, None] & (h < H)[None, :], other=0.0)
        b_y = tl.load(p_skips[:, None] + o[None, :], mask=m_y, other=0.0).to(tl.float32)
        b_y += tl.load(p_b2 + o, mask=m_o, other=0.0).to(tl.float32)[None, :]
        b_y = tl.dot(b_h, tl.trans(b_w), b_y, input_precision=PRECISION)
        tl.store(p_rows[:, None] + o[None, :], b_y.to(dtype), mask=m_y)
    if STREAM:
        advance_history(
            p_x, p_history, p_first, p_active, p_arrivals, tile, group, tl.cdiv(T, seg), B, per_tile,
            T, C, pad, sx_b, sx_t, sh_b, MODE, 64, BLOCK_P,
        )  # fmt: skip


def resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, dilation: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None, scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_resblock(x, weight1, bias1, weight2, bias2, dilation, pad, history)
    (batch, channels, length), (hidden, _, kernel) = x.shape, weight1.shape
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    if hidden > WIDEST[x.dtype]:
        hidden_channels = causal_conv1d(
            x, weight1, bias1, dilation=dilation, pad=pad, pad_mode=pad_mode, pre="elu", post="elu",
            history=history, first=first, active=active,
        )  # fmt: skip
        return causal_conv1d(hidden_channels, weight2, bias2, residual=skip)
    y = layout.empty_channels_last(x, channels, length)
    if not batch:
        return y
    stream = history is not None and pad[0] > 0
    tile = _blocks(batch * length, channels, hidden, kernel, x, stream)
    seg, per_tile, groups, tiles = segments(batch, length, tile["BLOCK_T"])
    h: Any = history if stream else x
    f, a = (first, active) if stream else (x, x)
    _launch.launch(
        "resblock", resblock_fwd_kernel, (groups * tiles,),
        x, by_taps(weight1), bias1, weight2.contiguous(), bias2, skip, h, f, a,
        _launch.arrivals(x, groups) if stream else x, y,
        batch, length, channels, hidden, kernel, dilation, pad[0], mirrored_length(length, pad, pad_mode),
        seg, per_tile,
        x.stride(0), x.stride(2), skip.stride(0), skip.stride(2), y.stride(0), y.stride(2), h.stride(0),
        MODE=pad_mode, STREAM=stream, BLOCK_P=triton.next_power_of_2(pad[0]) if stream else 1,
        PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
    return y


def _blocks(rows: int, channels: int, hidden: int, kernel: int, x: Tensor, stream: bool) -> dict[str, int]:
    """Block sizes, warps and pipeline stages for `rows` = B * T rows."""
    fp32 = x.dtype == torch.float32
    reduction = 32 if fp32 else 64  # as in `_conv.blocks`
    block_h = max(16, triton.next_power_of_2(hidden))
    block_c = min(reduction, triton.next_power_of_2(channels))
    taps = min(reduction // block_c, max(triton.next_power_of_2(kernel), 16 // block_c))
    block_t = 16 if rows <= 64 else 64 if fp32 or stream or block_h > 64 else 128
    return {
        "BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_C": block_c, "TAPS": taps,
        "BLOCK_O": min(32 if fp32 else 64, max(16, triton.next_power_of_2(channels))),
        "num_warps": 8 if block_h > 32 and rows > 64 else 4, "num_stages": 2,
    }  # fmt: skip
