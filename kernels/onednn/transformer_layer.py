"""`transformer_layer` by oneDNN: four products over weights laid out once, LayerScale folded into two of them.

GELU and the additions to the input are part of the products. A step of a stream is bound by reading the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import memory
from ._prepacked import lay_out, linear, unsupported  # noqa: F401
from .window_attention import window_attention


def transformer_layer(
    x: Tensor,  # [B, T, C]
    norm1_weight: Tensor,  # [C]
    norm1_bias: Tensor,
    q: Tensor,  # [H * D, C]
    k: Tensor,  # [H_kv * D, C]
    v: Tensor,
    o: Tensor,  # [C, H * D]
    scale1: Tensor,  # [C]
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1: Tensor,  # [F, C]
    fc2: Tensor,  # [C, F]
    scale2: Tensor,  # [C]
    inv_freq: Tensor,  # [D / 2] fp32
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    *,
    window: int,
    eps: float,
    activation: str = "gelu",
    rope_scale: float = 1.0,
    offset: Tensor | None = None,  # [B] int64
    cache_k: Tensor | None = None,  # [B, H_kv, window, D], mutated
    cache_v: Tensor | None = None,
    active: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B, T, C]
    if not x.numel():
        return torch.empty_like(x)
    rows = [b for b in (q_bias, k_bias, v_bias, o_bias) if b is not None]
    if rows and len(rows) < 4:
        pairs = ((q_bias, q), (k_bias, k), (v_bias, v), (o_bias, o))
        rows = [weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs]
    packed = memory.packed((q, k, v, o, scale1, fc1, fc2, scale2, *rows), "onednn layer", _pack)
    dim = 2 * len(inv_freq)
    normal = F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)
    heads = linear(normal, packed.qkv, packed.qkv_bias).unflatten(-1, (-1, dim)).transpose(1, 2)  # [B, H, T, D]
    parts = heads.split([len(weight) // dim for weight in (q, k, v)], dim=1)
    y = window_attention(
        parts[0], parts[1], parts[2], inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active,
    )  # fmt: skip
    x = linear(y.transpose(1, 2).flatten(-2), packed.out, packed.out_bias, residual=x.contiguous())
    normal = F.layer_norm(x, x.shape[-1:], norm2_weight, norm2_bias, eps)
    return linear(linear(normal, packed.fc1, post=activation), packed.fc2, residual=x)


class _Packed(NamedTuple):
    qkv: list[Tensor]
    qkv_bias: Tensor | None
    out: list[Tensor]
    out_bias: Tensor | None
    fc1: list[Tensor]
    fc2: list[Tensor]


def _pack(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale1: Tensor, fc1: Tensor, fc2: Tensor, scale2: Tensor, *rows: Tensor
) -> _Packed:
    return _Packed(
        lay_out(torch.cat([q, k, v])), torch.cat(rows[:3]) if rows else None,
        lay_out(scale1[:, None] * o), scale1 * rows[3] if rows else None,
        lay_out(fc1, whole=True), lay_out(scale2[:, None] * fc2),
    )  # fmt: skip
