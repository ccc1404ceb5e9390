"""Triton kernels for `window_attention`: RoPE, sliding-window flash attention (arXiv 2205.14135) and ring cache.

    y_i = sum_j softmax_j(rope(q_i) . rope(k_j) / sqrt(D)) v_j        over i - window < j <= i

A program processes BLOCK_Q queries of one head and visits only the blocks of keys that these can see, so that work and
memory are linear in T. Scores and sums are fp32. Angles cost more than products do, so each key is rotated once:

- few: if all queries of a key head fit in one tile, as in a frame of a stream, one launch does everything. A program
  has a key head to itself: it rotates the new keys, attends, and writes the ring, which nobody else reads.
- many: a launch before attention rotates all new keys into a scratch tensor, and in a stream one after it moves the
  ring on. Between launches there is nothing to wait for, so no program counts others.

Queries are rotated where they are loaded, once per program. When streaming, the keys of earlier calls come from the
ring buffer ([B, H_kv, window, D], already rotated, position p in slot p % window), at an offset per batch row that is
read on the device. Slots are visited in their order in memory; the position in each follows from the slot that is
written next.

RoPE angles are fp32 products, as in the reference. They are reduced to [-pi / 4, pi / 4] in fp64, which is accurate
enough for any position and avoids the slow path of the library's sine, which needs stack memory. There is no division:
2 / pi is a factor, and at the edges, where its rounding shows, either quarter is right.

Dropout is not supported: backward would have to reproduce its mask.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_attention
from . import _launch

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_PI = tl.constexpr(1.5707963267948966)
QUARTERS = tl.constexpr(0.6366197723675814)  # of a turn, per radian
FEW_QUERIES = 16  # of a key head, which one program attends to
ROTATED = 16  # positions per program of the kernel that rotates keys
COPIED = 64  # positions per program of the kernel that writes the ring


@triton.jit
def cos_sin(position, b_freq):
    """cos and sin [N, HALF] of positions [N] times frequencies [HALF]."""
    angle = (position.to(tl.float32)[:, None] * b_freq[None, :]).to(tl.float64)
    quarters = tl.floor(angle * QUARTERS + 0.5)
    x = (angle - quarters * HALF_PI).to(tl.float32)
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    q = quarters.to(tl.int32) & 3
    odd = (q & 1) == 1
    angle_cos = tl.where(odd, sin, cos) * tl.where((q == 1) | (q == 2), -1.0, 1.0)
    angle_sin = tl.where(odd, cos, sin) * tl.where(q >= 2, -1.0, 1.0)
    return angle_cos, angle_sin


@triton.jit
def halves(D, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Offsets within a head of the two elements of each pair [HALF], and which pairs there are."""
    half = tl.arange(0, HALF)
    if INTERLEAVED:
        return half * 2, half * 2 + 1, half < D // 2
    return half, half + D // 2, half < D // 2


@triton.jit
def load_rotated(p_rows, o_a, o_b, m_rows, m_half, cos, sin):
    """Load rows [N, D] at p_rows [N] and rotate them: returns the elements of all pairs (a, b), [N, HALF] each."""
    m = m_rows[:, None] & m_half[None, :]
    a = tl.load(p_rows[:, None] + o_a[None, :], mask=m, other=0.0)
    b = tl.load(p_rows[:, None] + o_b[None, :], mask=m, other=0.0)
    dtype: tl.constexpr = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def joined(a, b, INTERLEAVED: tl.constexpr):
    """The elements of pairs (a, b), [N, HALF] each, as rows [N, 2 * HALF] in the order in which they are in memory."""
    pairs = tl.join(a, b)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, (0, 2, 1))
    return tl.reshape(pairs, (a.shape[0], 2 * a.shape[1]))


@triton.jit
def attend(q, k, v, visible, row_max, row_sum, acc, scale, PRECISION: tl.constexpr):
    """Online softmax (arXiv 1805.02867): update row maximum [N], row sum [N] and acc [N, D] with one block of keys."""
    scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # finite from the start: -inf - new_max is not NaN
    weights = tl.exp2(scores * scale - (new_max * scale)[:, None])
    rescale = tl.exp2((row_max - new_max) * scale)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_max, row_sum * rescale + tl.sum(weights, axis=1), acc


@triton.jit
def attention_tile(
    tile, p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows,
    H, H_kv, T, D, window, scale, rope_scale,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
    INTERLEAVED: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_Q)
    group = H // H_kv
    if FEW:  # all queries of a key head
        b, h_kv = (tile // H_kv).to(tl.int64), tile % H_kv
        start = 0
        h, i, m_row = h_kv * group + r // T, r % T, r < T * group
    else:
        blocks = tl.cdiv(T, BLOCK_Q)
        head = tile // blocks
        b, h_kv = (head // H).to(tl.int64), head % H // group
        start = (tile % blocks) * BLOCK_Q
        h, i = head % H + tl.zeros_like(r), start + r
        m_row = i < T
    o_a, o_b, m_half = halves(D, HALF, INTERLEAVED)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, 2 * HALF)
    m_d, m_c = d < D, c < D
    if PADDED:  # the columns of `joined`, which leaves a gap behind each half
        m_c = c % HALF < D // 2
        c = tl.where(c < HALF, c, c - HALF + D // 2)
    b_freq = tl.load(p_freq + tl.arange(0, HALF), mask=m_half, other=0.0)
    state = tl.load(p_state_rows + b) if ROWS else b
    offset = 0
    if STREAM:
        offset = tl.load(p_offset + state)

    o_rows = h.to(tl.int64) * sq_h + i.to(tl.int64) * sq_t
    cos, sin = cos_sin(offset + i, b_freq)
    q_a, q_b = load_rotated(p_q + b * sq_b + o_rows, o_a, o_b, m_row, m_half, cos * rope_scale, sin * rope_scale)
    q = joined(q_a, q_b, INTERLEAVED)
    scale *= LOG2_E
    row_max = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    p_keys = p_k + b * sk_b + h_kv * sk_h
    p_values = p_v + b * sv_b + h_kv * sv_h
    if STREAM:  # keys of earlier calls: j < 0, counted from the first of this call
        o_ring = (state * H_kv + h_kv) * window * D
        next_slot = (offset % window).to(tl.int32)
        held = tl.where(start < window - 1, tl.minimum(offset, window), 0).to(tl.int32)
        for s0 in range(0, held, BLOCK_K):
            s = s0 + tl.arange(0, BLOCK_K)
            j = s - next_slot - tl.where(s < next_slot, 0, window)
            exists = (s < held) & (j > start - window)
            p_slots = o_ring + s[:, None] * D
            k = tl.load(p_ring_k + p_slots + c[None, :], mask=exists[:, None] & m_c[None, :], other=0.0)
            v = tl.load(p_ring_v + p_slots + d[None, :], mask=exists[:, None] & m_d[None, :], other=0.0)
            k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast, the ring has a wider dtype
            visible = exists[None, :] & (j[None, :] > i[:, None] - window)
            row_max, row_sum, acc = attend(q, k, v, visible, row_max, row_sum, acc, scale, PRECISION)
    if FEW:
        j = tl.arange(0, BLOCK_Q)
        cos, sin = cos_sin(offset + j, b_freq)
        p_rows = p_keys + j.to(tl.int64) * sk_t
        k_a, k_b = load_rotated(p_rows, o_a, o_b, j < T, m_half, cos * rope_scale, sin * rope_scale)
        m_v = (j < T)[:, None] & m_d[None, :]
        v = tl.load(p_values + (j.to(tl.int64) * sv_t)[:, None] + d[None, :], mask=m_v, other=0.0)
        visible = (j[None, :] <= i[:, None]) & (j[None, :] > i[:, None] - window)
        k = joined(k_a, k_b, INTERLEAVED)
        row_max, row_sum, acc = attend(q, k, v, visible, row_max, row_sum, acc, scale, PRECISION)
    else:  # keys that are rotated already
        for j0 in range(tl.maximum(start - window + 1, 0), tl.minimum(start + BLOCK_Q, T), BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            j64 = j.to(tl.int64)[:, None]
            k = tl.load(p_keys + j64 * sk_t + c[None, :], mask=(j < T)[:, None] & m_c[None, :], other=0.0)
            v = tl.load(p_values + j64 * sv_t + d[None, :], mask=(j < T)[:, None] & m_d[None, :], other=0.0)
            visible = (j[None, :] <= i[:, None]) & (j[None, :] > i[:, None] - window)  # i < T where it counts
            row_max, row_sum, acc = attend(q, k, v, visible, row_max, row_sum, acc, scale, PRECISION)

    p_rows = p_y + b * sy_b + h.to(tl.int64) * sy_h + i.to(tl.int64) * sy_t
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(p_rows[:, None] + d[None, :], acc.to(p_y.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])

    if STREAM and FEW:
        tl.debug_barrier()  # all threads have read the ring
        if tl.load(p_active + state):
            m_new = (j < T) & (j >= T - window)
            p_slots = o_ring + ((next_slot + j) % window)[:, None] * D
            m_k, m_v = m_new[:, None] & m_half[None, :], m_new[:, None] & m_d[None, :]
            tl.store(p_ring_k + p_slots + o_a[None, :], k_a, mask=m_k)
            tl.store(p_ring_k + p_slots + o_b[None, :], k_b, mask=m_k)
            tl.store(p_ring_v + p_slots + d[None, :], v, mask=m_v)


@triton.jit(do_not_specialize=["T"])
def window_attention_fwd_kernel(
    p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows,
    H, H_kv, T, D, window, scale, rope_scale,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
    INTERLEAVED: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attention_tile(
        tl.program_id(0), p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows,
        H, H_kv, T, D, window, scale, rope_scale,
        sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
        INTERLEAVED, STREAM, ROWS, FEW, PADDED, BLOCK_Q, BLOCK_K, BLOCK_D, HALF, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def window_attention_rotate_kernel(
    p_k, p_freq, p_offset, p_state_rows, p_rotated, H_kv, T, D, rope_scale, sk_b, sk_h, sk_t,
    INTERLEAVED: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate keys into [B, T, H_kv, D], all heads of BLOCK_K positions by the same angles."""
    blocks = tl.cdiv(T, BLOCK_K)
    b, j = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    o_a, o_b, m_half = halves(D, HALF, INTERLEAVED)
    offset = 0
    if STREAM:
        offset = tl.load(p_offset + (tl.load(p_state_rows + b) if ROWS else b))
    cos, sin = cos_sin(offset + j, tl.load(p_freq + tl.arange(0, HALF), mask=m_half, other=0.0))
    cos, sin = cos * rope_scale, sin * rope_scale
    p_keys = p_k + b * sk_b + j.to(tl.int64) * sk_t
    p_rows = p_rotated + (b * T + j) * H_kv * D
    m = (j < T)[:, None] & m_half[None, :]
    for h in range(H_kv):
        k_a, k_b = load_rotated(p_keys + h * sk_h, o_a, o_b, j < T, m_half, cos, sin)
        tl.store((p_rows + h * D)[:, None] + o_a[None, :], k_a, mask=m)
        tl.store((p_rows + h * D)[:, None] + o_b[None, :], k_b, mask=m)


@triton.jit(do_not_specialize=["T"])
def window_attention_ring_kernel(
    p_k, p_v, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows, H_kv, T, D, window,
    sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the last `window` of the new positions, keys rotated, into the rings of the active rows."""
    blocks = tl.cdiv(tl.minimum(T, window), BLOCK_K)
    b, h = (tl.program_id(0) // blocks // H_kv).to(tl.int64), tl.program_id(0) // blocks % H_kv
    state = tl.load(p_state_rows + b) if ROWS else b
    if tl.load(p_active + state):
        j = tl.maximum(T - window, 0) + tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        j64, d = j.to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
        m = (j < T)[:, None] & (d < D)
        next_slot = (tl.load(p_offset + state) % window).to(tl.int32)
        o_slots = (state * H_kv + h) * window * D + ((next_slot + j) % window)[:, None] * D + d
        tl.store(p_ring_k + o_slots, tl.load(p_k + b * sk_b + h * sk_h + j64 * sk_t + d, mask=m), mask=m)
        tl.store(p_ring_v + o_slots, tl.load(p_v + b * sv_b + h * sv_h + j64 * sv_t + d, mask=m), mask=m)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int, rope_scale: float = 1.0,
    interleaved: bool = False, offset: Tensor | None = None, cache_k: Tensor | None = None,
    cache_v: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is [B, T, H, D] in memory."""
    check_attention(q, k, v, window, cache_k, cache_v, rows)
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    y = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    if not y.numel():
        return y
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    state, kind = state_arguments(q, offset, cache_k, cache_v, active, rows)
    few = one_tile(length, heads // kv_heads)
    if not few:
        new, k = k, k.new_empty(batch, length, kv_heads, dim).transpose(1, 2)
        _launch.launch(
            "window_attention", window_attention_rotate_kernel, (triton.cdiv(length, ROTATED) * batch,),
            new, inv_freq, state[0], state[-1], k, kv_heads, length, dim, rope_scale, *new.stride()[:3],
            INTERLEAVED=interleaved, **kind, BLOCK_K=ROTATED, HALF=_half(dim), num_warps=4,
        )  # fmt: skip
    arguments, options = tile_arguments(q, k, v, inv_freq, y, state, window, rope_scale, interleaved)
    programs = batch * kv_heads if few else triton.cdiv(length, options["BLOCK_Q"]) * batch * heads
    _launch.launch("window_attention", window_attention_fwd_kernel, (programs,), *arguments, **kind, **options)
    if cache_k is not None and not few:
        _launch.launch(
            "window_attention", window_attention_ring_kernel,
            (triton.cdiv(min(length, window), COPIED) * batch * kv_heads,), k, v, *state,
            kv_heads, length, dim, window, *k.stride()[:3], *v.stride()[:3],
            ROWS=kind["ROWS"], BLOCK_K=COPIED, BLOCK_D=options["BLOCK_D"], num_warps=4,
        )  # fmt: skip
    return y


def one_tile(length: int, group: int) -> bool:
    """Whether all queries of a key head, of which there are `group` times the length, fit in one tile."""
    return length * group <= FEW_QUERIES


def state_arguments(
    q: Tensor, offset: Tensor | None, cache_k: Tensor | None, cache_v: Tensor | None, active: Tensor | None,
    rows: Tensor | None,
) -> tuple[list[Tensor], dict[str, bool]]:  # fmt: skip
    """The tensors of the state, q where there are none, and whether they are of a stream and of rows of a pool."""
    stream = cache_k is not None
    state = [q if t is None or not stream else t for t in (offset, cache_k, cache_v, active, rows)]
    return state, {"STREAM": stream, "ROWS": stream and rows is not None}


def tile_arguments(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, y: Tensor, state: list[Tensor], window: int, rope_scale: float,
    interleaved: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The arguments of `attention_tile` after the tile, and its constants but the state's, with warps and stages."""
    (_, heads, length, dim), kv_heads, half = q.shape, k.shape[1], _half(q.shape[3])
    few = one_tile(length, heads // kv_heads)
    arguments = (
        q, k, v, inv_freq, y, *state, heads, kv_heads, length, dim, window, dim**-0.5, rope_scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3],
    )  # fmt: skip
    options = {
        "INTERLEAVED": interleaved, "FEW": few, "PADDED": not interleaved and 2 * half != dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "HALF": half, "PRECISION": _launch.precision(q),
        **_blocks(few, dim, q),
    }  # fmt: skip
    return arguments, options


def _half(dim: int) -> int:
    return max(8, triton.next_power_of_2(dim // 2))


def _blocks(few: bool, dim: int, q: Tensor) -> dict[str, int]:
    """The largest tiles that spill no registers on sm_80, sm_90 and sm_100 (`make kernels-report`).

    Few queries: nothing hides the latency of memory but loads in flight, so the ring is read in two or four blocks.
    """
    fp32, wide = q.dtype == torch.float32, dim > 64
    if few:
        return {
            "BLOCK_Q": FEW_QUERIES,
            "BLOCK_K": (64 if fp32 or dim < 64 else 128) // (1 + wide),
            "num_warps": 4 << fp32,
            "num_stages": 2,
        }
    if fp32:
        return {"BLOCK_Q": 16 if wide else 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 64, "BLOCK_K": 64 if dim >= 64 else 32, "num_warps": 4, "num_stages": 2}
