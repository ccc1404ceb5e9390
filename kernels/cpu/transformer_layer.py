"""CPU kernel for `transformer_layer`: the whole layer in one parallel region (native/transformer.h), weights packed.

A step of a stream is limited by the memory bandwidth of reading the weights: 12.6 MB in fp32 for 512 channels and 2048
hidden ones, which is 0.3 ms at 40 GB/s. A dozen separate operations would add as much again in overhead.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import packing, quantized
from .._common import check_norm, check_state, stacked_bias
from ._abi import ACTIVATIONS, DTYPES, KINDS, Attention, Layer, Linear
from ._native import native
from ._pack import address, check_dtypes, in_panels, kind_of, per_output


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
    check_dtypes(x, q, k, v, o, fc1, fc2, cache_k, cache_v)
    check_norm(norm, norm1_bias, norm2_bias)
    x = x.contiguous()
    batch, length, _ = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    packed = packing.packed(
        (q, k, v, o, fc1, fc2, q_bias, k_bias, v_bias, o_bias,
         norm1_weight, norm1_bias, norm2_weight, norm2_bias, scale1, scale2),
        f"layer {native().name} {scales is not None}", partial(_pack, scales),
    )  # fmt: skip
    native().keep(x, packed, inv_freq, y)
    dim = 2 * len(inv_freq)
    if cache_k is not None and cache_v is not None:
        for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
            check_state(name, cache, (batch, k.shape[0] // dim, window, dim), rows)
    layer = Layer.from_buffer_copy(packed.structure)
    layer.x, layer.y, layer.rows = x.data_ptr(), y.data_ptr(), batch * length
    layer.epsilon, layer.rms, layer.activation = eps, norm == "rms", ACTIVATIONS[activation]
    layer.attention = Attention(
        batch=batch, length=length, heads=q.shape[0] // dim, kv_heads=k.shape[0] // dim, dim=dim, window=window,
        dtype=DTYPES[x.dtype], inv_freq=inv_freq.data_ptr(), rope_scale=rope_scale, offset=address(offset),
        cache_k=address(cache_k), cache_v=address(cache_v), active=address(active), rows=address(rows),
    )  # fmt: skip
    native().layer(layer, packed.kind, torch.get_num_threads())
    return y


class _Packed(NamedTuple):
    tensors: list[Tensor | None]  # what `structure` points to
    structure: Layer
    kind: int


def _pack(
    scales: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, fc1: Tensor, fc2: Tensor,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, o_bias: Tensor | None, *others: Tensor | None,
) -> _Packed:  # fmt: skip
    qkv_bias, o_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias, scale1, scale2 = vectors = [
        None if vector is None else per_output(vector)
        for vector in (stacked_bias((q, k, v), (q_bias, k_bias, v_bias)), o_bias, *others)
    ]
    products = (torch.cat([q, k, v]), o, fc1, fc2)
    steps = [None] * 4 if scales is None else [*scales.split([len(weight) for weight in products])]
    integers = map(quantized.integers, products, steps)
    whole = [weight for weight in integers if weight is not None]
    if len(whole) < 4:  # all must be of one kind
        whole, steps = [*products], [None] * 4
    kept: list[Tensor | None] = [*vectors]

    def linear(weight: Tensor, step: Tensor | None, bias: Tensor | None = None, scale: Tensor | None = None) -> Linear:
        packed, step = in_panels(weight[:, None]), None if step is None else per_output(step)
        kept.extend((packed, step))
        return Linear(address(packed), address(bias), address(step), address(scale), len(weight))

    structure = Layer(
        dtype=DTYPES[q.dtype], channels=q.shape[1], hidden=len(fc1), norm1_weight=address(norm1_weight),
        norm1_bias=address(norm1_bias), norm2_weight=address(norm2_weight), norm2_bias=address(norm2_bias),
        qkv=linear(whole[0], steps[0], qkv_bias), out=linear(whole[1], steps[1], o_bias, scale1),
        fc1=linear(whole[2], steps[2]), fc2=linear(whole[3], steps[3], None, scale2),
    )  # fmt: skip
    return _Packed(kept, structure, KINDS[kind_of(whole[0].dtype)])
