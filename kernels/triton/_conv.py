"""Convolution as an implicit GEMM on the tensor cores, shared by the kernels that contain one.

    acc[i, o] = sum_{k, c} act(x[b_i, c, t_i * stride + k * dilation - pad]) * w[o, k, c]

where row i of the GEMM is output time t_i of batch row b_i. Activations are channels-last ([B, T, C] in memory), and
weights are [C_out, K, C]. So with dilation 1, what a row reads is one contiguous window of K * C elements, as is the
weight that it is multiplied with; the reduction runs over it in blocks of BLOCK_R elements, whatever K and C are, with
an fp32 accumulator. What lies before the start of x is in the history [B, pad, C]: reading it takes another address,
not another load. Other cases (dilation, padding that is not zero, one group of several) find the time and channel of
each element first.

A tile holds `seg` consecutive times of each of `per_tile` batch rows; a batch row longer than a tile is divided among
several tiles. The tiles of the same batch rows form a group. A history is read by the tiles of one group only: they
increment an arrival counter when they have read it, and the last one to arrive overwrites it.

Where there are few rows, a tile's reduction is split among `SPLITS` programs, so that all processors read weights. The
last of them to arrive adds their sums, in their order, whichever came last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ...runtime import packing
from . import _launch

# Arguments that vary from call to call: Triton must not specialize (recompile) kernels for their values.
LENGTHS = ("B", "T", "T_out", "mirror", "seg", "per_tile")
PROCESSORS = 132  # of an H100; enough programs for so many are about enough for any GPU
MOST_SPLITS = 16
LOG2_E = tl.constexpr(1.4426950408889634)
FEW_ROWS, SOME_ROWS = 64, 2048  # of the GEMM: a frame of one stream; of some tens of streams


@triton.jit
def _exp2(x):
    return tl.exp2(x)


# libdevice's flushes results below 2^-126 to zero, which `tl.exp2` spends three more instructions on not to do
exp2 = _exp2 if _launch.INTERPRETED else libdevice.exp2


@triton.jit
def activate(x, KIND: tl.constexpr, FINE: tl.constexpr):
    """none, elu or silu of fp32 x. FINE: exp(x) - 1 is relatively accurate near 0, as needed for fp32 results."""
    if KIND == "elu":
        below = exp2(x * LOG2_E) - 1.0
        if FINE:
            near = 1.0 / 720 + x * (1.0 / 5040)
            near = 1.0 / 24 + x * (1.0 / 120 + x * near)
            near = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * near)))
            below = tl.where(x > -0.35, near, below)
        x = tl.where(x > 0, x, below)
    elif KIND == "silu":
        x = x / (1.0 + exp2(x * -LOG2_E))
    return x


@triton.jit
def rows_of(tile, B, length, seg, per_tile, halo, SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """The rows of a tile: batch rows b int64, times t, the mask of valid rows, and the group.

    Each segment has `halo` rows before it, for the times before its own. Without SHARED, `per_tile` is 1, and b is a
    number; else all are [BLOCK_T].
    """
    per_row = tl.cdiv(length, seg)  # tiles per batch row
    group = tile // per_row
    i = tl.arange(0, BLOCK_T)
    if SHARED:
        b = (group * per_tile + i // (seg + halo)).to(tl.int64)
        t = (tile % per_row) * seg + i % (seg + halo) - halo
        valid = (i < per_tile * (seg + halo)) & (t < length) & (b < B)
    else:
        b = group.to(tl.int64)
        t = (tile % per_row) * seg + i - halo
        valid = (i < seg + halo) & (t < length)
    return b, t, valid, group


@triton.jit
def state_rows(p_state_rows, b, m_row, ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The rows of the state that batch rows b of a tile (`rows_of`) continue: those that are named, if ROWS."""
    if ROWS:
        if SHARED:
            b = tl.load(p_state_rows + b, mask=m_row, other=0)
        else:
            b = tl.load(p_state_rows + b)
    return b


@triton.jit
def time_in_signal(time, T, mirror, fresh, MODE: tl.constexpr):
    """The time in x or, if negative, in the history that stands for `time`; those that are too large are padding."""
    if MODE == "replicate":
        time = tl.minimum(time, T - 1)
        time = tl.where((time < 0) & fresh, 0, time)
    elif MODE == "reflect":
        time = tl.where(time < 0, -time, time)
        time = tl.where(time < mirror, time, 2 * mirror - 2 - time)
    return time


@triton.jit
def load_either(first, p_first, p_second, mask, SELECT: tl.constexpr):
    """Load from p_first where `first`, elsewhere from p_second: by one load, if the compiler can SELECT pointers."""
    if SELECT:
        x = tl.load(tl.where(first, p_first, p_second), mask=mask, other=0.0)
    else:
        x = tl.load(p_first, mask=mask & first, other=0.0) + tl.load(p_second, mask=mask & (first == 0), other=0.0)
    return x


@triton.jit
def convolve(
    p_x, p_history, p_w, b, state, t, m_row, fresh, o, r_start, r_stop,
    T, C, O, K, stride, dilation, pad, mirror, sx_b, sx_t, sh_b, sh_t,
    PRE: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr, SELECT: tl.constexpr, FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over window elements [r_start, r_stop), [BLOCK_T, BLOCK_O] fp32, for rows (b, t) and output channels o.

    `state` are the rows of the history that they continue. `fresh` [BLOCK_T] marks the rows whose batch row is at the
    start of its stream, or all of them offline. `mirror` is the length of the signal that 'reflect' mirrors
    (`mirrored_length`).
    FLAT: windows are contiguous and padded with zeros. EVEN: BLOCK_R divides C, so each block lies within one tap.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    window = K * C
    start = t * stride - pad  # [BLOCK_T]
    begin = start.to(tl.int64) * C if FLAT else start * 0
    p_rows, p_past = p_x + b * sx_b + begin, p_history + state * sh_b + pad * sh_t + begin  # [BLOCK_T]
    if FLAT:
        # the elements of a window that are in x: [low, high)
        low = tl.minimum(tl.maximum(-begin, 0), window).to(tl.int32)
        high = tl.where(m_row, tl.minimum(tl.maximum(T.to(tl.int64) * C - begin, 0), window), 0).to(tl.int32)
    p_weights = p_w + o * window
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for r0 in range(r_start, r_stop, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        m_r = r < window
        if FLAT:
            m_x = r[None, :] < high[:, None]
            is_past = r[None, :] < low[:, None]
            o_x = r[None, :]
            o_past = o_x
        else:
            k = r0 // C if EVEN else r // C
            c = r - k * C
            if EVEN:
                time = (start + k * dilation)[:, None]  # [BLOCK_T, 1]
            else:
                time = start[:, None] + (k * dilation)[None, :]
            time = time_in_signal(time, T, mirror, fresh[:, None], MODE)
            m_x = m_row[:, None] & m_r[None, :] & (time < T)
            is_past = time < 0
            o_x = time.to(tl.int64) * sx_t + c[None, :]
            o_past = time.to(tl.int64) * sh_t + c[None, :]
        if STREAM:
            b_x = load_either(is_past, p_past[:, None] + o_past, p_rows[:, None] + o_x, m_x, SELECT)
        else:
            b_x = tl.load(p_rows[:, None] + o_x, mask=m_x & (is_past == 0), other=0.0)
        if PRE != "none":
            b_x = activate(b_x.to(tl.float32), PRE, dtype == tl.float32).to(dtype)
        b_w = tl.load(p_weights[:, None] + r[None, :], mask=(o < O)[:, None] & m_r[None, :], other=0.0)
        acc = tl.dot(b_x, tl.trans(b_w.to(dtype)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def advance_history(
    p_x, p_history, p_first, p_active, p_state_rows, p_arrivals, group, per_group, B, per_tile,
    T, C, pad, sx_b, sx_t, sh_b, sh_t,
    MODE: tl.constexpr, SELECT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last program of a group to arrive replaces its rows' history by the last `pad` times of (history, x)."""
    tl.debug_barrier()  # all threads of this program have read the history
    if tl.atomic_add(p_arrivals + group, 1, sem="acq_rel") == per_group - 1:
        tl.store(p_arrivals + group, 0)
        for j in range(per_tile):
            b = (group * per_tile + j).to(tl.int64)
            state = state_rows(p_state_rows, b, b < B, ROWS, True)
            if tl.load(p_active + state, mask=b < B, other=0):
                first = tl.load(p_first + state)
                for e0 in range(0, pad * C, BLOCK):
                    e = e0 + tl.arange(0, BLOCK)
                    i, c = e // C, e % C
                    m = e < pad * C
                    time = T - pad + i
                    if MODE == "replicate":
                        time = tl.where((time < 0) & first, 0, time)
                    p_new = p_x + b * sx_b + time.to(tl.int64) * sx_t + c
                    p_old = p_history + state * sh_b + c
                    b_h = load_either(time < 0, p_old + (pad + time) * sh_t, p_new, m, SELECT)
                    tl.debug_barrier()  # everything is read before any of it is overwritten
                    tl.store(p_old + i * sh_t, b_h, mask=m)


def by_taps(weight: Tensor) -> Tensor:
    """A convolution's weight [C_out, C, K], packed as [C_out, K, C]."""
    return packing.packed(weight, "by_taps", lambda w: w.permute(0, 2, 1).contiguous())


def channels_of(tensor: Tensor | None, dim: int, group: int, groups: int) -> Tensor | None:
    """The channels of one group, which are along dimension `dim`; the tensor itself if there is one group."""
    return tensor if tensor is None or groups == 1 else tensor.chunk(groups, dim)[group]


def mirrored_length(length: int, pad: tuple[int, int], pad_mode: str) -> int:
    """The length of the signal that 'reflect' mirrors.

    It is T, except that a signal too short for the padding is extended with zeros, as in transformers and moshi.
    """
    return max(length, max(pad) + 1) if pad_mode == "reflect" else length


def blocks(rows: int, C: int, O: int, K: int, x: Tensor, flat: bool, plain: bool) -> dict[str, Any]:
    """Block sizes, splits, warps and pipeline stages for a convolution with `rows` = B * T_out output rows.

    flat: its windows are contiguous and padded with zeros. plain: besides, it has neither history nor residual. Each of
    these takes registers that the largest tile does not have, as does a split sum.
    """
    fp32 = x.dtype == torch.float32
    # elements per step of the reduction: 128 bytes
    block_r = min(32 if fp32 else 64, max(16, triton.next_power_of_2(K * C)))
    if rows <= FEW_ROWS:  # a step of a stream: limited by reading the weights, so many small programs
        tile = {"BLOCK_T": 16, "BLOCK_O": 32, "num_warps": 2 if fp32 and flat else 4, "num_stages": 4}
    elif O <= 64:
        block_o = max(16, triton.next_power_of_2(O))
        # fp32 is three TF32 products, with operands of their own: half the tile, to avoid spills
        tall = block_o == 16 or not fp32
        tile = {"BLOCK_T": 128 if tall else 64, "BLOCK_O": block_o, "num_warps": 4, "num_stages": 3}
    elif rows <= SOME_ROWS:
        tile = {"BLOCK_T": 64, "BLOCK_O": 64, "num_warps": 4, "num_stages": 3 if fp32 else 4}
    elif fp32 or not plain or triton.cdiv(rows, 256) * O <= 128 * PROCESSORS or not _launch.has_warp_groups(x):
        tile = {"BLOCK_T": 128, "BLOCK_O": 64 if fp32 else 128, "num_warps": 8, "num_stages": 3}
    else:
        tile = {"BLOCK_T": 256, "BLOCK_O": 128, "num_warps": 8, "num_stages": 3}
    steps = triton.cdiv(K * C, block_r)
    programs = triton.cdiv(rows, tile["BLOCK_T"]) * triton.cdiv(O, tile["BLOCK_O"])
    splits = min(MOST_SPLITS, 2 * PROCESSORS // programs, steps // 4)  # at least four steps each
    return {"BLOCK_R": block_r, "SPLITS": max(1, splits), **tile}


def segments(B: int, length: int, block_t: int, halo: int = 0) -> tuple[int, int, int, int]:
    """How rows are divided into tiles: times per segment, batch rows per tile, number of groups, tiles per group."""
    seg = min(length, block_t - halo)
    per_tile = block_t // (seg + halo) if seg == length else 1
    return seg, per_tile, triton.cdiv(B, per_tile), triton.cdiv(length, seg)
