"""CPU kernel for `window_attention`: RoPE, attention within the window, and the ring caches (native/attention.h).

250 positions with 8 heads of 64 and a full window take 128 MFLOP; q, k, v and the result are 2 MB together. The keys
and values of one head, at most 256 KB with those of the ring, stay in the caches of a thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._native import DTYPES, Attention, native
from ._pack import address, check_dtypes, check_state


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
) -> Tensor:  # [B, H, T, D], in memory [B, T, H, D]
    if cache_k is not None and cache_v is not None and cache_k.dtype != q.dtype:  # under autocast
        wide_q, wide_k, wide_v = (t.to(cache_k.dtype) for t in (q, k, v))
        y = window_attention(
            wide_q, wide_k, wide_v, inv_freq, window=window, rope_scale=rope_scale, interleaved=interleaved,
            offset=offset, cache_k=cache_k, cache_v=cache_v, active=active,
        )  # fmt: skip
        return y.to(q.dtype)
    check_dtypes(q, k, v, cache_k, cache_v)
    if q.shape[1] % k.shape[1] or k.shape != v.shape or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"the shapes of q, k and v do not match: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if cache_k is not None and cache_v is not None:
        for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
            check_state(name, cache, (len(k), k.shape[1], window, k.shape[3]))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, length, dim = q.shape
    y = q.new_empty(batch, length, heads, dim)
    if y.numel():
        native().keep(q, k, v, inv_freq, y)
        call = Attention(
            *(t.data_ptr() for t in (q, k, v, y)), DTYPES[q.dtype], batch, heads, k.shape[1], length, dim,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], inv_freq.data_ptr(), rope_scale, interleaved, window,
            *map(address, (offset, cache_k, cache_v, active)),
        )  # fmt: skip
        native().attention(call, torch.get_num_threads())
    return y.transpose(1, 2)
