"""Triton kernel for `window_attention`: RoPE, sliding-window flash attention (arXiv 2205.14135) and ring cache.

    y_i = sum_j softmax_j(rope(q_i) . rope(k_j) / sqrt(D)) v_j        over i - window < j <= i

A program processes BLOCK_Q queries of one head and visits only the blocks of keys that these can see, so that work and
memory are linear in T. The two elements of the pairs that RoPE rotates are held in separate tensors (a, b), since
q . k = qa . ka + qb . kb; the half-rotated and the interleaved layout differ only in the addresses from which they are
read. Scores and sums are fp32.

When streaming, the keys of earlier calls come from the ring buffer ([B, H_kv, window, D], already rotated, position p
in slot p % window), at an offset per batch row that is read on the device. The last program of each (batch row, key
head) to arrive writes the new keys and values into the ring.

RoPE angles are fp32 products, as in the reference. They are reduced to [-pi / 4, pi / 4] in fp64, which is accurate
enough for any position and avoids the slow path of the library's sine, which needs stack memory.

Dropout is not supported: backward would have to reproduce its mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_attention
from . import _launch

LOG2_E = tl.constexpr(1.4426950408889634)
HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def cos_sin(position, b_freq):
    """cos and sin [N, HALF] of positions [N] times frequencies [HALF]."""
    angle = (position.to(tl.float32)[:, None] * b_freq[None, :]).to(tl.float64)
    quarters = tl.floor(angle / HALF_PI + 0.5)
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
def load_rotated(p_rows, o_a, o_b, m_rows, m_half, position, b_freq, rope_scale):
    """Load rows [N, D] at p_rows [N] and rotate them by their positions: returns (a, b), [N, HALF] each."""
    m = m_rows[:, None] & m_half[None, :]
    a = tl.load(p_rows[:, None] + o_a[None, :], mask=m, other=0.0)
    b = tl.load(p_rows[:, None] + o_b[None, :], mask=m, other=0.0)
    dtype: tl.constexpr = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    cos, sin = cos_sin(position, b_freq)
    cos, sin = cos * rope_scale, sin * rope_scale
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def attend(q_a, q_b, k_a, k_b, v, visible, row_max, row_sum, acc, scale, PRECISION: tl.constexpr):
    """Online softmax (arXiv 1805.02867): update row maximum [N], row sum [N] and acc [N, D] with one block of keys."""
    scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION) * (scale * LOG2_E)
    scores = tl.where(visible, scores, -1.0e30)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.where(visible, tl.exp2(scores - new_max[:, None]), 0.0)
    rescale = tl.exp2(row_max - new_max)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_max, row_sum * rescale + tl.sum(weights, axis=1), acc


@triton.jit(do_not_specialize=["T"])
def window_attention_fwd_kernel(
    p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_arrivals,
    H, H_kv, T, D, window, scale, rope_scale,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
    INTERLEAVED: tl.constexpr, STREAM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_Q)
    start = (tl.program_id(0) % blocks) * BLOCK_Q
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), head % H
    h_kv = h // (H // H_kv)
    i = start + tl.arange(0, BLOCK_Q)  # queries, counted from the first of this call
    half, d = tl.arange(0, HALF), tl.arange(0, BLOCK_D)
    m_half, m_d = half < D // 2, d < D
    o_a, o_b = half, half + D // 2
    if INTERLEAVED:
        o_a, o_b = half * 2, half * 2 + 1
    b_freq = tl.load(p_freq + half, mask=m_half, other=0.0)
    offset = 0
    if STREAM:
        offset = tl.load(p_offset + b)

    p_queries = p_q + b * sq_b + h * sq_h + i.to(tl.int64) * sq_t
    q_a, q_b = load_rotated(p_queries, o_a, o_b, i < T, m_half, offset + i, b_freq, rope_scale)
    row_max = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    p_keys = p_k + b * sk_b + h_kv * sk_h
    p_values = p_v + b * sv_b + h_kv * sv_h
    if STREAM:  # keys of earlier calls: j < 0, counted from the first of this call
        o_ring = (b * H_kv + h_kv) * window * D
        for j0 in range(start - window + 1, 0, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            exists = (j < 0) & (offset + j >= 0)
            p_slots = o_ring + tl.where(exists, (offset + j) % window, 0) * D
            m_k = exists[:, None] & m_half[None, :]
            k_a = tl.load(p_ring_k + p_slots[:, None] + o_a[None, :], mask=m_k, other=0.0).to(q_a.dtype)
            k_b = tl.load(p_ring_k + p_slots[:, None] + o_b[None, :], mask=m_k, other=0.0).to(q_a.dtype)
            v = tl.load(p_ring_v + p_slots[:, None] + d[None, :], mask=exists[:, None] & m_d[None, :], other=0.0)
            v = v.to(q_a.dtype)  # under autocast, the ring has a wider dtype
            visible = exists[None, :] & (j[None, :] > i[:, None] - window)
            row_max, row_sum, acc = attend(q_a, q_b, k_a, k_b, v, visible, row_max, row_sum, acc, scale, PRECISION)
    for j0 in range(tl.maximum(start - window + 1, 0), tl.minimum(start + BLOCK_Q, T), BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        j64 = j.to(tl.int64)
        k_a, k_b = load_rotated(p_keys + j64 * sk_t, o_a, o_b, j < T, m_half, offset + j, b_freq, rope_scale)
        m_v = (j < T)[:, None] & m_d[None, :]
        v = tl.load(p_values + (j64 * sv_t)[:, None] + d[None, :], mask=m_v, other=0.0)
        visible = (j[None, :] <= i[:, None]) & (j[None, :] > i[:, None] - window) & (j < T)[None, :]
        row_max, row_sum, acc = attend(q_a, q_b, k_a, k_b, v, visible, row_max, row_sum, acc, scale, PRECISION)

    p_rows = p_y + b * sy_b + h * sy_h + i.to(tl.int64) * sy_t
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(p_rows[:, None] + d[None, :], acc.to(p_y.dtype.element_ty), mask=(i < T)[:, None] & m_d[None, :])

    if STREAM:
        tl.debug_barrier()  # all threads have read the ring
        counter = p_arrivals + b * H_kv + h_kv
        if tl.atomic_add(counter, 1, sem="acq_rel") == blocks * (H // H_kv) - 1:
            tl.store(counter, 0)
            if tl.load(p_active + b):
                o_ring = (b * H_kv + h_kv) * window * D
                for j0 in range(tl.maximum(T - window, 0), T, BLOCK_K):
                    j = j0 + tl.arange(0, BLOCK_K)
                    j64 = j.to(tl.int64)
                    p_slots = o_ring + (offset + j) % window * D
                    k_a, k_b = load_rotated(
                        p_keys + j64 * sk_t, o_a, o_b, j < T, m_half, offset + j, b_freq, rope_scale
                    )
                    m_k, m_v = (j < T)[:, None] & m_half[None, :], (j < T)[:, None] & m_d[None, :]
                    v = tl.load(p_values + (j64 * sv_t)[:, None] + d[None, :], mask=m_v, other=0.0)
                    tl.store(p_ring_k + p_slots[:, None] + o_a[None, :], k_a, mask=m_k)
                    tl.store(p_ring_k + p_slots[:, None] + o_b[None, :], k_b, mask=m_k)
                    tl.store(p_ring_v + p_slots[:, None] + d[None, :], v, mask=m_v)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int, rope_scale: float = 1.0,
    interleaved: bool = False, offset: Tensor | None = None, cache_k: Tensor | None = None,
    cache_v: Tensor | None = None, active: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is [B, T, H, D] in memory."""
    check_attention(q, k, v, window, cache_k, cache_v)
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    y = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    if not y.numel():
        return y
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    stream = cache_k is not None
    tile = _blocks(length, dim, q)
    _launch.launch(
        "window_attention", window_attention_fwd_kernel, (triton.cdiv(length, tile["BLOCK_Q"]) * batch * heads,),
        q, k, v, inv_freq, y, *((offset, cache_k, cache_v, active) if stream else (q, q, q, q)),
        _launch.arrivals(q, batch * kv_heads) if stream else q,
        heads, kv_heads, length, dim, window, dim**-0.5, rope_scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3],
        INTERLEAVED=interleaved, STREAM=stream,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), HALF=max(16, triton.next_power_of_2(dim // 2)),
        PRECISION=_launch.precision(q), **tile,
    )  # fmt: skip
    return y


def _blocks(length: int, dim: int, q: Tensor) -> dict[str, int]:
    """The largest tiles that spill no registers on sm_80, sm_90 and sm_100 (`make kernels-report`)."""
    fp32 = q.dtype == torch.float32
    if length <= 16 or (fp32 and dim > 64):
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if fp32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
