"""Reference for `window_attention`: RoPE on q and k, then causal attention over the last `window` positions.

    query i of batch row b has position p = offset[b] + i and attends to the positions in (p - window, p]

Work and memory are linear in T: queries are processed in blocks, each with only the keys that its queries can see.

When streaming, `cache_k` and `cache_v` are ring buffers of `window` slots: position p is in slot p % window, and keys
are stored after rotation. The positions of this call are written in place for the active batch rows. The state may be
that of a pool, as in `causal_conv1d`. Both RoPE layouts
are supported, half-rotated (transformers) and interleaved (Kyutai). Angles and rotations are computed in fp32 whatever
the dtype of q and k, as in moshi.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

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
    dropout: float = 0.0,
    offset: Tensor | None = None,  # [B] int64: positions already seen
    cache_k: Tensor | None = None,  # [B, H_kv, window, D], mutated
    cache_v: Tensor | None = None,
    active: Tensor | None = None,  # [B] bool
    rows: Tensor | None = None,  # [B] int64: rows of a pool's state
) -> Tensor:  # [B, H, T, D]
    _, heads, length, dim = q.shape
    if rows is not None and offset is not None:
        offset = offset[rows]
    index = torch.arange(length, device=q.device)
    positions = index[None] if offset is None else offset[:, None] + index  # [1 or B, T]
    q, k = (rotate(x, positions, inv_freq, rope_scale, interleaved) for x in (q, k))

    past = 0 if cache_k is None else window - 1  # keys before the first query of this call
    if cache_k is not None:
        assert cache_v is not None and offset is not None and active is not None, (
            "a cache needs `cache_v`, `offset` and `active`"
        )
        pools = cache_k, cache_v
        if rows is not None:
            cache_k, cache_v, active = cache_k[rows], cache_v[rows], active[rows]
        old_positions = offset[:, None] + torch.arange(-past, 0, device=q.device)  # [B, past]
        slots = (old_positions % window)[:, None, :, None].expand(-1, k.shape[1], -1, dim)
        old_k, old_v = cache_k.gather(2, slots), cache_v.gather(2, slots)
        for pool, cache, x in zip(pools, (cache_k, cache_v), (k, v), strict=True):
            pool[... if rows is None else rows] = _with_new(cache, x, positions, active)
        k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)

    k, v = (repeat(x, "b h t d -> b (h n) t d", n=heads // x.shape[1]) for x in (k, v))
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first_key, last_key = max(0, start + past - window + 1), stop + past
        query_index = torch.arange(start, stop, device=q.device)[:, None] + past
        key_index = torch.arange(first_key, last_key, device=q.device)
        visible = (key_index <= query_index) & (key_index > query_index - window)  # [block, keys]
        if offset is not None:  # there are no keys before the start of a stream
            visible = visible & (offset[:, None] - past + key_index >= 0)[:, None, None]  # [B, 1, block, keys]
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first_key:last_key], v[:, :, first_key:last_key], visible, dropout
            )
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, scale: float, interleaved: bool) -> Tensor:
    """RoPE: rotate the pairs of elements of x [B, H, T, D] by the angles positions [1 or B, T] * inv_freq [D / 2].

    Pair i consists of the elements i and i + D / 2 or, with `interleaved`, of 2 i and 2 i + 1.
    """
    angles = (positions[..., None].float() * inv_freq)[:, None]  # [1 or B, 1, T, D / 2]
    cos, sin = angles.cos() * scale, angles.sin() * scale
    layout = "b h t (d pair)" if interleaved else "b h t (pair d)"
    a, b = rearrange(x, f"{layout} -> pair b h t d", pair=2)
    return rearrange([a * cos - b * sin, b * cos + a * sin], f"pair b h t d -> {layout}").to(x.dtype)


def _with_new(cache: Tensor, x: Tensor, positions: Tensor, active: Tensor) -> Tensor:
    """The ring buffer [B, H, W, D] with x [B, H, T, D] at slots position % W, for the active rows only."""
    window = cache.shape[2]
    x, positions = x[:, :, -window:], positions[:, -window:]
    slots = (positions % window)[:, None, :, None].expand_as(x)
    return cache.scatter(2, slots, torch.where(active[:, None, None, None], x, cache.gather(2, slots)))
