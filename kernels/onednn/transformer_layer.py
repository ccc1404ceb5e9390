"""`transformer_layer` by oneDNN: four products over weights laid out once, LayerScale folded into two of them.

GELU and the additions to the input are part of the products. A step of a stream is bound by reading the weights.
"""

from __future__ import annotations

from functools import partial
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
    norm1_bias: Tensor | None,
    q: Tensor,  # [H * D, C]
    k: Tensor,  # [H_kv * D, C]
    v: Tensor,
    o: Tensor,  # [C, H * D]
    scale1: Tensor | None,  # [C]
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc1: Tensor,  # [F, C]
    fc2: Tensor,  # [C, F]
    scale2: Tensor | None,  # [C]
    inv_freq: Tensor,  # [D / 2] fp32
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    *,
    window: int,
    eps: float,
    norm: str = "layer",
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
    scales = [scale for scale in (scale1, scale2) if scale is not None]
    form = f"onednn layer {scale1 is None} {scale2 is None}"
    packed = memory.packed((q, k, v, o, fc1, fc2, *rows, *scales), form, partial(_pack, scale1 is None, scale2 is None))
    dim = 2 * len(inv_freq)
    normal = _normalized(x, norm1_weight, norm1_bias, eps, norm)
    heads = linear(normal, packed.qkv, packed.qkv_bias).unflatten(-1, (-1, dim)).transpose(1, 2)  # [B, H, T, D]
    parts = heads.split([len(weight) // dim for weight in (q, k, v)], dim=1)
    y = window_attention(
        parts[0], parts[1], parts[2], inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active,
    )  # fmt: skip
    x = linear(y.transpose(1, 2).flatten(-2), packed.out, packed.out_bias, residual=x.contiguous())
    normal = _normalized(x, norm2_weight, norm2_bias, eps, norm)
    return linear(linear(normal, packed.fc1, post=activation), packed.fc2, residual=x)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    if norm != "rms":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if bias is not None:
        raise ValueError("an RMSNorm has no bias, got one")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _Packed(NamedTuple):
    qkv: list[Tensor]
    qkv_bias: Tensor | None
    out: list[Tensor]
    out_bias: Tensor | None
    fc1: list[Tensor]
    fc2: list[Tensor]


def _pack(
    plain1: bool, plain2: bool, q: Tensor, k: Tensor, v: Tensor, o: Tensor, fc1: Tensor, fc2: Tensor, *rows: Tensor
) -> _Packed:  # fmt: skip
    """`rows`: four biases, or none; then the scales, but where a half is `plain`."""
    biases, scales = (rows[:4], rows[4:]) if len(rows) >= 4 else ((), rows)
    one = o.new_ones(1)
    scale1, scale2 = one if plain1 else scales[0], one if plain2 else scales[-1]
    return _Packed(
        lay_out(torch.cat([q, k, v])), torch.cat(biases[:3]) if biases else None,
        lay_out(scale1[:, None] * o), scale1 * biases[3] if biases else None,
        lay_out(fc1, whole=True), lay_out(scale2[:, None] * fc2),
    )  # fmt: skip
