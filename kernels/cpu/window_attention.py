"""CPU kernel for `window_attention`: RoPE, attention within the window, and the ring caches (native/attention.h).

250 positions with 8 heads of 64 and a full window take 128 MFLOP; q, k, v and the result are 2 MB together. The keys
and values of one head, at most 256 KB with those of the ring, stay in the caches of a thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_attention, in_the_rings_dtype
from ._abi import DTYPES, Attention
from ._native import native
from ._pack import address, check_dtypes


@in_the_rings_dtype
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int, rope_scale: float = 1.0,
    interleaved: bool = False, offset: Tensor | None = None, cache_k: Tensor | None = None,
    cache_v: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is [B, T, H, D] in memory."""
    check_dtypes(q, k, v, cache_k, cache_v)
    check_attention(q, k, v, window, cache_k, cache_v, rows)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, length, dim = q.shape
    y = q.new_empty(batch, length, heads, dim)
    if y.numel():
        native().keep(q, k, v, inv_freq, y)
        call = Attention(
            *(t.data_ptr() for t in (q, k, v, y)), DTYPES[q.dtype], batch, heads, k.shape[1], length, dim,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], inv_freq.data_ptr(), rope_scale, interleaved, window,
            *map(address, (offset, cache_k, cache_v, active, rows)),
        )  # fmt: skip
        native().attention(call, torch.get_num_threads())
    return y.transpose(1, 2)
