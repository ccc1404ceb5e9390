"""`window_attention` with PyTorch's fused attention.

Queries are processed in blocks, each with only the keys that its queries can see. The ring caches are read in the order
of their slots, not of their positions: the attention mask is computed from the position that each slot holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import check_attention, in_the_rings_dtype

BLOCK = 256  # queries per block


@in_the_rings_dtype
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int, rope_scale: float = 1.0,
    interleaved: bool = False, offset: Tensor | None = None, cache_k: Tensor | None = None,
    cache_v: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is [B, T, H, D] in memory."""
    check_attention(q, k, v, window, cache_k, cache_v, rows)
    batch, heads, length, dim = q.shape
    mine = slice(None) if rows is None else rows  # of the state
    before = torch.zeros(1, dtype=torch.int64) if offset is None else offset[mine]  # [1 or B]
    positions = before[:, None] + torch.arange(length)  # [1 or B, T]
    angles = (positions[..., None].float() * inv_freq)[:, None]  # [1 or B, 1, T, D / 2]
    cos_sin = angles.cos() * rope_scale, angles.sin() * rope_scale
    q, k = (_rotated(x, *cos_sin, interleaved) for x in (q, k))
    y = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        visible_range = slice(max(0, start - window + 1), stop)
        keys, values, key_positions = k[:, :, visible_range], v[:, :, visible_range], positions[:, visible_range]
        if cache_k is not None and cache_v is not None and start < window:
            last = before[:, None] - 1
            slots = last - (last - torch.arange(window)) % window  # [B, window]: the position that each slot holds
            keys, values = torch.cat([cache_k[mine], keys], dim=2), torch.cat([cache_v[mine], values], dim=2)
            key_positions = torch.cat([slots, key_positions], dim=1)
        key_positions = key_positions[:, None, None]  # [1 or B, 1, 1, keys]
        query_positions = positions[:, None, start:stop, None]  # [1 or B, 1, queries, 1]
        visible = (key_positions <= query_positions) & (key_positions > query_positions - window) & (key_positions >= 0)
        if heads != k.shape[1]:
            keys, values = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (keys, values))
        y[:, :, start:stop] = F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, visible)
    if cache_k is not None and cache_v is not None:
        assert active is not None, "a cache needs `active`"
        moves = active[mine]
        advanced = torch.arange(len(active))[mine][moves][:, None]
        slots = positions[moves, -window:] % window
        cache_k[advanced, :, slots] = k[moves, :, -window:].transpose(1, 2)
        cache_v[advanced, :, slots] = v[moves, :, -window:].transpose(1, 2)
    return y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE in fp32: rotate pairs of elements of x [B, H, T, D] by angles with this cos and sin [1 or B, 1, T, D / 2].

    Pair i consists of the elements i and i + D / 2 or, with `interleaved`, of 2 i and 2 i + 1.
    """
    pairs = (-1, 2) if interleaved else (2, -1)
    a, b = x.unflatten(-1, pairs).unbind(-1 if interleaved else -2)
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if interleaved else -2)
    return rotated.flatten(-2).to(x.dtype)
