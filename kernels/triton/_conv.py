"""Convolution as an implicit GEMM on the tensor cores, shared by the kernels that contain one.

    acc[i, o] = sum_{k, c} act(x[b_i, c, t_i * stride + k * dilation - pad]) * w[o, k, c]

where row i of the GEMM is output time t_i of batch row b_i. Activations are channels-last ([B, T, C] in memory), so
that the channels that a tap reads are contiguous whatever its time shift; weights are [C_out, K, C]. The reduction runs
over (tap, channel) in blocks of TAPS x BLOCK_C, with an fp32 accumulator.

A tile holds `seg` consecutive times of each of `per_tile` batch rows; a batch row longer than a tile is divided among
several tiles. The tiles of the same batch rows form a group. A history is read by the tiles of one group only: they
increment an arrival counter when they have read it, and the last one to arrive overwrites it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing

# Arguments that vary from call to call: Triton must not specialize (recompile) kernels for their values.
LENGTHS = ("B", "T", "T_out", "mirror", "seg", "per_tile")


@triton.jit
def activate(x, KIND: tl.constexpr, FINE: tl.constexpr):
    """none, elu or silu of fp32 x. FINE: exp(x) - 1 is relatively accurate near 0, as needed for fp32 results."""
    if KIND == "elu":
        near = x * (1.0 + x * 0.5)
        if FINE:
            near = 1.0 / 720 + x * (1.0 / 5040)
            near = 1.0 / 24 + x * (1.0 / 120 + x * near)
            near = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * near)))
        x = tl.where(x > 0, x, tl.where(x > (-0.35 if FINE else -0.01), near, tl.exp(x) - 1.0))
    elif KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def rows_of(tile, B, length, seg, per_tile, BLOCK_T: tl.constexpr):
    """The rows of a tile: batch rows b [BLOCK_T] int64, times t [BLOCK_T], the mask of valid rows, and the group."""
    per_row = tl.cdiv(length, seg)  # tiles per batch row
    group = tile // per_row
    i = tl.arange(0, BLOCK_T)
    b = group * per_tile + i // seg
    t = (tile % per_row) * seg + i % seg
    return b.to(tl.int64), t, (i < per_tile * seg) & (t < length) & (b < B), group


@triton.jit
def convolve(
    p_x, p_history, p_w, b, t, m_row, fresh, o,
    T, C, O, K, stride, dilation, pad, mirror, sx_b, sx_t, sh_b,
    PRE: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The convolution's output [BLOCK_T, BLOCK_O], fp32, for rows (b, t) and output channels o.

    `fresh` [BLOCK_T] marks the rows whose batch row is at the start of its stream, or all of them offline. `mirror` is
    the length of the signal that 'reflect' mirrors (`mirrored_length`).
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float32
    r = tl.arange(0, TAPS * BLOCK_C)
    start = t * stride - pad  # [BLOCK_T]
    p_rows = p_x + (b * sx_b)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    per_tap = tl.cdiv(C, BLOCK_C)
    for step in range(tl.cdiv(K, TAPS) * per_tap):
        c = (step % per_tap) * BLOCK_C + r % BLOCK_C
        if TAPS == 1:  # one tap per block, so one time per row: [BLOCK_T, 1]
            k = step // per_tap
            time = (start + k * dilation)[:, None]
            m_r = c < C
        else:
            k = (step // per_tap) * TAPS + r // BLOCK_C
            time = start[:, None] + (k * dilation)[None, :]
            m_r = (c < C) & (k < K)
        if MODE == "replicate":
            time = tl.minimum(time, T - 1)
            time = tl.where((time < 0) & fresh[:, None], 0, time)
        elif MODE == "reflect":
            time = tl.where(time < 0, -time, time)
            time = tl.where(time < mirror, time, 2 * mirror - 2 - time)
        m_x = m_row[:, None] & m_r[None, :] & (time < T)
        b_x = tl.load(p_rows + time.to(tl.int64) * sx_t + c[None, :], mask=m_x & (time >= 0), other=0.0)
        if STREAM:  # times before this call are read from the history, [B, C, pad] in memory
            p_past = p_history + (b * sh_b)[:, None] + (c[None, :] * pad + pad + time)
            b_x += tl.load(p_past, mask=m_x & (time < 0), other=0.0)
        if PRE != "none":
            b_x = activate(b_x.to(tl.float32), PRE, FINE).to(dtype)
        b_w = tl.load(
            p_w + o[:, None] * (K * C) + (k * C + c)[None, :], mask=(o < O)[:, None] & m_r[None, :], other=0.0
        )
        acc = tl.dot(b_x, tl.trans(b_w.to(dtype)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def advance_history(
    p_x, p_history, p_first, p_active, p_arrivals, tile, group, per_group, B, per_tile,
    T, C, pad, sx_b, sx_t, sh_b, MODE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The last program of a group to arrive replaces its rows' history by the last `pad` times of (history, x)."""
    tl.debug_barrier()  # all threads of this program have read the history
    if tl.atomic_add(p_arrivals + group, 1, sem="acq_rel") == per_group - 1:
        tl.store(p_arrivals + group, 0)
        o_p = tl.arange(0, BLOCK_P)
        for j in range(per_tile):
            b = (group * per_tile + j).to(tl.int64)
            exists = b < B
            if tl.load(p_active + b, mask=exists, other=0):
                first = tl.load(p_first + b)
                time = (T - pad + o_p)[None, :]
                if MODE == "replicate":
                    time = tl.where((time < 0) & first, 0, time)
                for c0 in range(0, C, BLOCK_H):
                    c = (c0 + tl.arange(0, BLOCK_H))[:, None]
                    m = (c < C) & (o_p < pad)[None, :]
                    p_new = p_x + b * sx_b + time.to(tl.int64) * sx_t + c
                    p_old = p_history + b * sh_b + c * pad
                    b_h = tl.load(p_new, mask=m & (time >= 0), other=0.0)
                    b_h += tl.load(p_old + pad + time, mask=m & (time < 0), other=0.0)
                    tl.debug_barrier()  # everything is read before any of it is overwritten
                    tl.store(p_old + o_p[None, :], b_h, mask=m)


def by_taps(weight: Tensor) -> Tensor:
    """A convolution's weight [C_out, C, K], packed as [C_out, K, C]."""
    return packing.packed(weight, "by_taps", lambda w: w.permute(0, 2, 1).contiguous())


def mirrored_length(length: int, pad: tuple[int, int], pad_mode: str) -> int:
    """The length of the signal that 'reflect' mirrors.

    It is T, except that a signal too short for the padding is extended with zeros, as in transformers and moshi.
    """
    return max(length, max(pad) + 1) if pad_mode == "reflect" else length


def blocks(rows: int, C: int, O: int, K: int, x: Tensor, stream: bool = False) -> dict[str, Any]:
    """Block sizes, warps and pipeline stages for a convolution with `rows` = B * T_out output rows."""
    reduction = 32 if x.dtype == torch.float32 else 64  # elements per step of the reduction: 128 bytes
    block_c = min(reduction, triton.next_power_of_2(C))
    taps = min(reduction // block_c, max(triton.next_power_of_2(K), 16 // block_c))
    fp32 = x.dtype == torch.float32  # three TF32 products, with operands of their own: half the tile, to avoid spills
    if rows <= 64:  # a step of a stream: limited by reading the weights, so many small programs
        tile = {"BLOCK_T": 16, "BLOCK_O": 32, "num_warps": 2 if fp32 else 4, "num_stages": 3}
    elif O <= 64:
        block_o = max(16, triton.next_power_of_2(O))
        tall = block_o == 16 if fp32 else not stream  # reading the history also takes registers
        tile = {"BLOCK_T": 128 if tall else 64, "BLOCK_O": block_o, "num_warps": 4, "num_stages": 2 if stream else 3}
    else:
        tile = {"BLOCK_T": 128, "BLOCK_O": 64 if fp32 else 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_C": block_c, "TAPS": taps, **tile}


def segments(B: int, length: int, block_t: int) -> tuple[int, int, int, int]:
    """How rows are divided into tiles: times per segment, batch rows per tile, number of groups, tiles per group."""
    seg = min(length, block_t)
    per_tile = block_t // seg if length <= block_t else 1
    return seg, per_tile, triton.cdiv(B, per_tile), triton.cdiv(length, seg)
