"""CPU kernel of `transformer_layer`: the whole layer in one parallel region over packed weights (native/transformer.h).

A step of a stream is bound by reading the weights: 12.6 MB in fp32 for 512 channels and 2048 hidden ones, 0.3 ms at
40 GB/s, where a dozen separate operations take as long again to start.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from ._native import ACTIVATIONS, DTYPES, Layer, Linear, native, unsupported  # noqa: F401
from ._pack import Panels, address, panels, row
from .window_attention import attention_of


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
    x = x.contiguous()
    batch, length, channels = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    dim = 2 * len(inv_freq)
    shaped = x.new_empty(0).expand(0).new_empty((batch, length, q.shape[0] // dim, dim), device="meta")
    alive: list[Any] = []  # what the structures point at

    def linear(weights: Panels, bias: Tensor | None = None, scale: Tensor | None = None) -> Linear:
        rows = row(bias), row(scale)
        alive.extend((weights, *rows))
        return Linear(weights.weights.data_ptr(), address(rows[0]), None, address(rows[1]), weights.outputs)

    def pack(*weights: Tensor) -> Panels:
        return panels(weights, "linear", lambda *w: torch.cat(w)[:, None], x.dtype)

    qkv_bias = None if q_bias is None or k_bias is None or v_bias is None else torch.cat([q_bias, k_bias, v_bias])
    norms = [row(t) for t in (norm1_weight, norm1_bias, norm2_weight, norm2_bias)]
    layer = Layer(
        x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], batch * length, channels, fc1.shape[0], *map(address, norms), eps,
        ACTIVATIONS[activation], linear(pack(q, k, v), qkv_bias), linear(pack(o), o_bias, scale1), linear(pack(fc1)),
        linear(pack(fc2), None, scale2),
        attention_of(shaped, k.shape[0] // dim, inv_freq, window, rope_scale, offset, cache_k, cache_v, active),
    )  # fmt: skip
    native().layer(byref(layer), pack(o).kind, torch.get_num_threads())
    return y
