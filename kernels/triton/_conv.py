"""The convolution as an implicit GEMM on the tensor cores, shared by the kernels that convolve.

    acc[i, o] = sum_{k, c} act(x[b_i, c, t_i * stride + k * dilation - pad]) * w[o, k, c]        i: rows (b_i, t_i)

Activations lie time-major ([B, T, C] in memory), so that each tap's row of channels is contiguous whatever its shift,
and weights lie [C_out, K, C]. The reduction runs over (tap, channel) in blocks of TAPS x BLOCK_C. Accumulation is fp32.

A tile holds `seg` consecutive times of each of `per_tile` batch rows; a longer row takes several tiles. Thus a batch
row's history is read by the tiles of one group only, which can count themselves in and let the last one write it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing

# Arguments that vary from call to call: Triton is not to compile anew for their alignment.
LENGTHS = ("B", "T", "T_out", "mirror", "seg", "per_tile")


@triton.jit
def activate(x, KIND: tl.constexpr, FINE: tl.constexpr):
    """none, elu or silu of fp32 x; FINE: exp(x) - 1 keeps its relative accuracy near 0, as fp32 needs."""
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
    """The rows of a tile: batch rows b [BLOCK_T] int64, times t [BLOCK_T], which exist, and the tile's group."""
    per_row = tl.cdiv(length, seg)  # tiles for one batch row
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
    """[BLOCK_T, BLOCK_O] fp32; `fresh` marks rows at the start of their stream, `mirror` is T, or more (reflect)."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    FINE: tl.constexpr = dtype == tl.float32
    r = tl.arange(0, TAPS * BLOCK_C)
    start = t * stride - pad  # [BLOCK_T]
    p_rows = p_x + (b * sx_b)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    per_tap = tl.cdiv(C, BLOCK_C)
    for step in range(tl.cdiv(K, TAPS) * per_tap):
        c = (step % per_tap) * BLOCK_C + r % BLOCK_C
        if TAPS == 1:  # one tap for the whole block: times are [BLOCK_T, 1]
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
        if STREAM:  # what came before this call; [B, C, pad] in memory
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
    """The last program of a group to arrive moves its rows' history on to the last `pad` times of (history, x)."""
    tl.debug_barrier()  # all threads have read
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
                    tl.debug_barrier()  # all is read before any of it is overwritten
                    tl.store(p_old + o_p[None, :], b_h, mask=m)


def output_length(length: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int]) -> int:
    return max(0, (length + pad[0] + pad[1] - (kernel - 1) * dilation - 1) // stride + 1)


def by_taps(weight: Tensor) -> Tensor:
    """A convolution's weight [O, C, K] as [O, K, C]."""
    return packing.packed(weight, "by_taps", lambda w: w.permute(0, 2, 1).contiguous())


def mirrored_length(length: int, pad: tuple[int, int], pad_mode: str) -> int:
    """T, or more zeros where there is less than 'reflect' mirrors, as in the peers."""
    return max(length, max(pad) + 1) if pad_mode == "reflect" else length


def blocks(rows: int, C: int, O: int, K: int, x: Tensor, stream: bool = False) -> dict[str, Any]:
    """Block sizes, warps and pipeline stages of a convolution with so many output rows, B * T_out."""
    wide = 32 if x.dtype == torch.float32 else 64  # reduction elements per step: 128 bytes
    block_c = min(wide, triton.next_power_of_2(C))
    taps = min(wide // block_c, max(triton.next_power_of_2(K), 16 // block_c))
    fp32 = x.dtype == torch.float32  # three products, each with operands of its own: half the tile, or it spills
    if rows <= 64:  # a step of a stream: bound by reading weights, so many small programs
        tile = {"BLOCK_T": 16, "BLOCK_O": 32, "num_warps": 2 if fp32 else 4, "num_stages": 3}
    elif O <= 64:
        block_o = max(16, triton.next_power_of_2(O))
        tall = block_o == 16 if fp32 else not stream  # reading the history takes registers, too
        tile = {"BLOCK_T": 128 if tall else 64, "BLOCK_O": block_o, "num_warps": 4, "num_stages": 2 if stream else 3}
    else:
        tile = {"BLOCK_T": 128, "BLOCK_O": 64 if fp32 else 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_C": block_c, "TAPS": taps, **tile}


def segments(B: int, length: int, block_t: int) -> tuple[int, int, int, int]:
    """How rows are laid in tiles: times per segment, batch rows per tile, groups of batch rows, tiles per group."""
    seg = min(length, block_t)
    per_tile = block_t // seg if length <= block_t else 1
    return seg, per_tile, triton.cdiv(B, per_tile), triton.cdiv(length, seg)
