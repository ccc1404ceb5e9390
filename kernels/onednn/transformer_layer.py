"""`transformer_layer` with oneDNN: four linear layers with prepacked weights, LayerScale folded into two of them.

The activation and the residual additions are fused into the linear layers. A step of a stream is limited by the memory
bandwidth of reading the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import packing
from .._common import check_norm, normalized, stacked_bias
from ._prepacked import linear, prepack
from .window_attention import window_attention


def transformer_layer(
    x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    scale1: Tensor | None, norm2_weight: Tensor, norm2_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale2: Tensor | None, inv_freq: Tensor, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    v_bias: Tensor | None = None, o_bias: Tensor | None = None, scales: Tensor | None = None, *, window: int,
    eps: float, norm: str = "layer", activation: str = "gelu", rope_scale: float = 1.0, offset: Tensor | None = None,
    cache_k: Tensor | None = None, cache_v: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference."""
    check_norm(norm, norm1_bias, norm2_bias)
    if not x.numel():
        return torch.empty_like(x)
    packed = packing.packed(
        (q, k, v, o, fc1, fc2, scale1, scale2, q_bias, k_bias, v_bias, o_bias), "onednn layer", _pack
    )
    dim = 2 * len(inv_freq)
    hidden = normalized(x, norm1_weight, norm1_bias, eps, norm)
    heads = linear(hidden, packed.qkv, packed.qkv_bias).unflatten(-1, (-1, dim)).transpose(1, 2)  # [B, H, T, D]
    q_heads, k_heads, v_heads = heads.split([len(weight) // dim for weight in (q, k, v)], dim=1)
    y = window_attention(
        q_heads, k_heads, v_heads, inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active, rows=rows,
    )  # fmt: skip
    x = linear(y.transpose(1, 2).flatten(-2), packed.out, packed.out_bias, residual=x.contiguous())
    hidden = normalized(x, norm2_weight, norm2_bias, eps, norm)
    return linear(linear(hidden, packed.fc1, post=activation), packed.fc2, residual=x)


class _Packed(NamedTuple):
    qkv: list[Tensor]
    qkv_bias: Tensor | None
    out: list[Tensor]
    out_bias: Tensor | None
    fc1: list[Tensor]
    fc2: list[Tensor]


def _pack(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, fc1: Tensor, fc2: Tensor, scale1: Tensor | None,
    scale2: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, o_bias: Tensor | None,
) -> _Packed:  # fmt: skip
    one = o.new_ones(1)
    scale1, scale2 = one if scale1 is None else scale1, one if scale2 is None else scale2
    return _Packed(
        prepack(torch.cat([q, k, v])), stacked_bias((q, k, v), (q_bias, k_bias, v_bias)),
        prepack(scale1[:, None] * o), None if o_bias is None else scale1 * o_bias,
        prepack(fc1, whole=True), prepack(scale2[:, None] * fc2),
    )  # fmt: skip
