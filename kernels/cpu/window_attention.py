"""CPU kernel of `window_attention`: RoPE, the band alone, softmax and values per head, and the rings (native/attention.h).

For 250 positions of 8 heads of 64 with a full window: 128 MFLOP; q, k, v and the result are 2 MB. A head's keys and
values, 256 KB at most with the ring before them, stay in a thread's caches.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from ._native import DTYPES, Attention, native, unsupported  # noqa: F401
from ._pack import address


def window_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H_kv, T, D], H a multiple of H_kv
    v: Tensor,  # [B, H_kv, T, D]
    inv_freq: Tensor,  # [D / 2] fp32
    *,
    window: int,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    offset: Tensor | None = None,  # [B] int64
    cache_k: Tensor | None = None,  # [B, H_kv, window, D], mutated
    cache_v: Tensor | None = None,
    active: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B, H, T, D], a position's heads next to each other in memory
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, length, dim = q.shape
    y = q.new_empty(batch, length, heads, dim)
    if y.numel():
        call = attention_of(y, k.shape[1], inv_freq, window, rope_scale, offset, cache_k, cache_v, active)
        call.q, call.k, call.v, call.y = (t.data_ptr() for t in (q, k, v, y))
        call.q_batch, call.q_head, call.q_step, _ = q.stride()
        call.k_batch, call.k_head, call.k_step, _ = k.stride()
        call.v_batch, call.v_head, call.v_step, _ = v.stride()
        call.interleaved = interleaved
        native().attention(byref(call), torch.get_num_threads())
    return y.transpose(1, 2)


def attention_of(
    shaped: Tensor,  # [B, T, H, D], for its shape and dtype
    kv_heads: int,
    inv_freq: Tensor,
    window: int,
    rope_scale: float,
    offset: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    active: Tensor | None,
) -> Attention:
    """Everything about the attention but where q, k, v and the result lie."""
    batch, length, heads, dim = shaped.shape
    return Attention(
        dtype=DTYPES[shaped.dtype], batch=batch, heads=heads, kv_heads=kv_heads, length=length, dim=dim,
        inv_freq=inv_freq.data_ptr(), rope_scale=rope_scale, window=window, offset=address(offset),
        cache_k=address(cache_k), cache_v=address(cache_v), active=address(active),
    )  # fmt: skip
