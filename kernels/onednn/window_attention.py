"""`window_attention` by PyTorch's fused attention, a ring's keys as they lie: a mask knows which position each holds.

Blocks of queries meet only the keys that their band can reach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._prepacked import unsupported  # noqa: F401

BLOCK = 256  # queries per block


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
    if cache_k is not None and cache_v is not None and cache_k.dtype != q.dtype:  # under autocast
        wide_q, wide_k, wide_v = (t.to(cache_k.dtype) for t in (q, k, v))
        y = window_attention(
            wide_q, wide_k, wide_v, inv_freq, window=window, rope_scale=rope_scale, interleaved=interleaved,
            offset=offset, cache_k=cache_k, cache_v=cache_v, active=active,
        )  # fmt: skip
        return y.to(q.dtype)
    batch, heads, length, dim = q.shape
    before = torch.zeros(1, dtype=torch.int64) if offset is None else offset  # [1 or B]
    positions = before[:, None] + torch.arange(length)  # [1 or B, T]
    angles = (positions[..., None].float() * inv_freq)[:, None]  # [1 or B, 1, T, D / 2]
    turn = angles.cos() * rope_scale, angles.sin() * rope_scale
    q, k = (_rotated(x, *turn, interleaved) for x in (q, k))
    y = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        reach = slice(max(0, start - window + 1), stop)
        keys, values, held = k[:, :, reach], v[:, :, reach], positions[:, reach]
        if cache_k is not None and cache_v is not None and start < window:
            last = before[:, None] - 1
            slots = last - (last - torch.arange(window)) % window  # [B, window]: the latest position of each slot
            keys, values = torch.cat([cache_k, keys], dim=2), torch.cat([cache_v, values], dim=2)
            held = torch.cat([slots, held], dim=1)
        held, now = held[:, None, None], positions[:, None, start:stop, None]  # [1 or B, 1, queries or 1, keys or 1]
        visible = (held <= now) & (held > now - window) & (held >= 0)
        if heads != k.shape[1]:
            keys, values = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (keys, values))
        y[:, :, start:stop] = F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, visible)
    if cache_k is not None and cache_v is not None:
        assert active is not None, "a cache comes with `active`"
        rows = active.nonzero()
        slots = positions[active, -window:] % window
        cache_k[rows, :, slots] = k[active, :, -window:].transpose(1, 2)
        cache_v[rows, :, slots] = v[active, :, -window:].transpose(1, 2)
    return y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D] turned, in fp32, by angles [1 or B, 1, T, D / 2]: of pairs (i, i + D / 2), or (2i, 2i + 1)."""
    pairs = (-1, 2) if interleaved else (2, -1)
    a, b = x.unflatten(-1, pairs).unbind(-1 if interleaved else -2)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if interleaved else -2)
    return turned.flatten(-2).to(x.dtype)
