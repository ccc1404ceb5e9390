"""Ops for `torch.export` with open lengths: the reference's results without its loops over lengths.

A loop over a length is unrolled when it is traced, which fixes the length. Here attention gathers the keys of all
blocks of queries at once (memory stays linear in T), the search takes all rows at once, and the number of codebooks to
decode may be open too. Everything else traces as it is.

The caches of streams hold the last `window` keys and values in order, not as rings: what a step returns is all new
anyway, and moving a cache is cheaper than gathering from it. All rows of a batch advance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rvq_encode import encode_rows
from .window_attention import rotate

BLOCK = 64  # queries per block offline: each block sees `window` + BLOCK keys


def window_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H_kv, T, D]
    v: Tensor,  # [B, H_kv, T, D]
    inv_freq: Tensor,  # [D / 2]
    *,
    window: int,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    dropout: float = 0.0,
    offset: Tensor | None = None,  # [B] int64
    cache_k: Tensor | None = None,  # [B, H_kv, window, D], mutated
    cache_v: Tensor | None = None,
    active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # [B, H, T, D]
    """As `window_attention.window_attention`, but for the order of the caches; `active` and `rows` are ignored."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    index = torch.arange(length)
    positions = index[None] if offset is None else offset[:, None] + index  # [1 or B, T]
    q, k = (rotate(x, positions, inv_freq, rope_scale, interleaved) for x in (q, k))
    if cache_k is None or cache_v is None:
        blocks = (length + BLOCK - 1) // BLOCK
        missing = blocks * BLOCK - length
        index = torch.arange(blocks)[:, None] * BLOCK + torch.arange(window + BLOCK)  # [blocks, keys]
        q = F.pad(q, (0, 0, 0, missing)).unflatten(2, (blocks, BLOCK))  # [B, H, blocks, BLOCK, D]
        k, v = (_grouped(F.pad(x, (0, 0, window, missing))[:, :, index], groups) for x in (k, v))
        seen = _visible(torch.arange(BLOCK), window) & (index >= window)[:, None]  # [blocks, BLOCK, keys]
        y = _attend(q, k, v, seen).flatten(2, 3)
        return y[:, :, torch.arange(length)]  # a slice would be traced as one that may be shorter
    assert offset is not None, "a cache needs `offset`"
    k, v = torch.cat([cache_k, k], dim=2), torch.cat([cache_v, v], dim=2)  # [B, H_kv, window + T, D]
    cache_k.copy_(k[:, :, length:])
    cache_v.copy_(v[:, :, length:])
    there = offset[:, None] - window + torch.arange(window + length) >= 0  # [B, keys]: not before the stream's start
    seen = _visible(index, window) & there[:, None, None]  # [B, 1, T, keys]
    return _attend(q, _grouped(k, groups), _grouped(v, groups), seen)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` for any number of dimensions, which ONNX's exporter lacks."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.where(seen, scores, -torch.inf).softmax(dim=-1) @ v


def _visible(index: Tensor, window: int) -> Tensor:
    """Which keys queries [T] see: [T, window + T] bool. Before the key of the first query there are `window` keys."""
    keys = torch.arange(window + index.shape[0])
    return (keys <= index[:, None] + window) & (keys > index[:, None])


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Keys or values [B, H_kv, ..., D] for each query head: [B, H_kv * groups, ..., D]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D] and codebooks [L, S, D] -> codes [L, N] int64; the distances of all rows exist at once."""
    return encode_rows(x.to(codebooks.dtype), codebooks, codebooks.square().sum(dim=-1))


def rvq_decode(codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """codes [L, N] and codebooks [L or more, S, D] -> [N, D]; L may be open."""
    levels, (_, size, width) = torch.arange(codes.shape[0])[:, None], codebooks.shape
    total = codebooks.reshape(-1, width)[codes + levels * size].sum(dim=0)
    return total if dtype is None else total.to(dtype)
