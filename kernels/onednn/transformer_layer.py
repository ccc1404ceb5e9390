"""`transformer_layer` with oneDNN: four linear layers with prepacked weights, LayerScale folded into two of them.

The activation and the residual additions are fused into the linear layers. A step of a stream is limited by the memory
bandwidth of reading the weights.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import packing
from ._prepacked import linear, prepack
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
    vectors = (scale1, scale2, q_bias, k_bias, v_bias, o_bias)
    present = tuple(vector is not None for vector in vectors)
    weights = (q, k, v, o, fc1, fc2, *(vector for vector in vectors if vector is not None))
    packed = packing.packed(weights, f"onednn layer {present}", partial(_pack, present))
    dim = 2 * len(inv_freq)
    hidden = _normalized(x, norm1_weight, norm1_bias, eps, norm)
    heads = linear(hidden, packed.qkv, packed.qkv_bias).unflatten(-1, (-1, dim)).transpose(1, 2)  # [B, H, T, D]
    q_heads, k_heads, v_heads = heads.split([len(weight) // dim for weight in (q, k, v)], dim=1)
    y = window_attention(
        q_heads, k_heads, v_heads, inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active,
    )  # fmt: skip
    x = linear(y.transpose(1, 2).flatten(-2), packed.out, packed.out_bias, residual=x.contiguous())
    hidden = _normalized(x, norm2_weight, norm2_bias, eps, norm)
    return linear(linear(hidden, packed.fc1, post=activation), packed.fc2, residual=x)


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
    present: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor, o: Tensor, fc1: Tensor, fc2: Tensor, *given: Tensor
) -> _Packed:
    """Prepack the weights of a layer.

    `present` says which optional vectors there are, in the order of `vectors` above; `given` holds those that are.
    """
    remaining = iter(given)
    scale1, scale2 = (next(remaining) if is_present else o.new_ones(1) for is_present in present[:2])
    biases = []
    if any(present[2:]):
        pairs = zip(present[2:], (q, k, v, o), strict=True)
        biases = [next(remaining) if is_present else weight.new_zeros(len(weight)) for is_present, weight in pairs]
    return _Packed(
        prepack(torch.cat([q, k, v])), torch.cat(biases[:3]) if biases else None,
        prepack(scale1[:, None] * o), scale1 * biases[3] if biases else None,
        prepack(fc1, whole=True), prepack(scale2[:, None] * fc2),
    )  # fmt: skip
