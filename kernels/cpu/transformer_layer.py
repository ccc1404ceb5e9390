"""CPU kernel for `transformer_layer`: the whole layer in one parallel region (native/transformer.h), weights packed.

A step of a stream is limited by the memory bandwidth of reading the weights: 12.6 MB in fp32 for 512 channels and 2048
hidden ones, which is 0.3 ms at 40 GB/s. A dozen separate operations would add as much again in overhead.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import packing
from ._native import ACTIVATIONS, DTYPES, KINDS, Attention, Layer, Linear, native
from ._pack import address, check_dtypes, check_state, kind_of, packed_weight, per_output


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
    check_dtypes(x, q, k, v, o, fc1, fc2, cache_k, cache_v)
    if norm == "rms" and (norm1_bias is not None or norm2_bias is not None):
        raise ValueError("an RMSNorm has no bias, got one")
    x = x.contiguous()
    batch, length, _ = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    vectors = (norm1_weight, norm1_bias, norm2_weight, norm2_bias, scale1, scale2, q_bias, k_bias, v_bias, o_bias)
    present = tuple(vector is not None for vector in vectors)
    weights = (q, k, v, o, fc1, fc2, *(vector for vector in vectors if vector is not None))
    packed = packing.packed(weights, f"layer {native().name} {present}", partial(_pack, present))
    native().keep(x, packed, inv_freq, y)
    dim = 2 * len(inv_freq)
    if cache_k is not None and cache_v is not None:
        for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
            check_state(name, cache, (batch, k.shape[0] // dim, window, dim))
    layer = Layer.from_buffer_copy(packed.structure)
    layer.x, layer.y, layer.rows = x.data_ptr(), y.data_ptr(), batch * length
    layer.epsilon, layer.rms, layer.activation = eps, norm == "rms", ACTIVATIONS[activation]
    layer.attention = Attention(
        batch=batch, length=length, heads=q.shape[0] // dim, kv_heads=k.shape[0] // dim, dim=dim, window=window,
        dtype=DTYPES[x.dtype], inv_freq=inv_freq.data_ptr(), rope_scale=rope_scale, offset=address(offset),
        cache_k=address(cache_k), cache_v=address(cache_v), active=address(active),
    )  # fmt: skip
    native().layer(layer, packed.kind, torch.get_num_threads())
    return y


class _Packed(NamedTuple):
    tensors: list[Tensor]  # what `structure` points to
    structure: Layer
    kind: int


def _pack(
    present: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor, o: Tensor, fc1: Tensor, fc2: Tensor, *given: Tensor
) -> _Packed:
    """Pack the weights of a layer.

    `present` says which optional vectors there are, in the order of `vectors` above; `given` holds those that are.
    """
    remaining = iter(given)
    vectors = [next(remaining) if is_present else None for is_present in present]
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, scale1, scale2 = (
        vector if vector is None else per_output(vector) for vector in vectors[:6]
    )
    biases: list[Tensor] = []
    if any(present[6:]):
        pairs = zip(vectors[6:], (q, k, v, o), strict=True)
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs]
    qkv_bias = per_output(torch.cat(biases[:3])) if biases else None
    products = (torch.cat([q, k, v]), o, fc1, fc2)
    for channel in (0, None):  # all must be of one kind: int8 if all can be, else as they are
        weights = [packed_weight(weight[:, None], lambda w: w, channel) for weight in products]
        if len({packed.dtype for packed, _ in weights}) == 1:
            break
    kept = [vector for vector in (norm1_weight, norm1_bias, norm2_weight, norm2_bias) if vector is not None]

    def linear(i: int, bias: Tensor | None = None, scale: Tensor | None = None) -> Linear:
        packed, steps = weights[i]
        kept.extend(t for t in (packed, steps, bias, scale) if t is not None)
        return Linear(address(packed), address(bias), address(steps), address(scale), len(products[i]))

    structure = Layer(
        dtype=DTYPES[q.dtype], channels=q.shape[1], hidden=len(fc1), norm1_weight=address(norm1_weight),
        norm1_bias=address(norm1_bias), norm2_weight=address(norm2_weight), norm2_bias=address(norm2_bias),
        qkv=linear(0, qkv_bias), out=linear(1, per_output(biases[3]) if biases else None, scale1), fc1=linear(2),
        fc2=linear(3, None, scale2),
    )  # fmt: skip
    return _Packed(kept, structure, KINDS[kind_of(weights[0][0].dtype)])
