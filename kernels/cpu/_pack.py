"""Packs weights into the panels that the native library reads (native/gemm.h), and checks what is passed to it.

fp32 weights are packed as fp32, except quantized ones (fastmimi/runtime/quantized.py): these are multiples of a scale
per output channel and are packed as int8, which loses nothing. bf16 weights are packed as bf16, and interleaved in
pairs of channels where the processor has bf16 dot products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import packing, quantized
from ._abi import DTYPES, KINDS, Weights
from ._native import native


class Panels(NamedTuple):
    """Packed weights and bias of a product, and the structure that holds their addresses."""

    tensors: tuple[Tensor | None, ...]  # what `structure` points to
    structure: Weights
    kind: int


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# The library gets bare addresses, so dtypes and shapes are checked before a call.


def check_dtypes(*tensors: Tensor | None) -> None:
    """Raise TypeError unless all tensors have the same dtype and the library computes in it."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise TypeError(f"tensors must all be float32 or all bfloat16, got {', '.join(sorted(map(str, dtypes)))}")


def kind_of(dtype: torch.dtype) -> str:
    """The kind of product (KINDS) for packed weights of this dtype in the variant in use."""
    dot_products = native().name == "avx512bf16"  # instructions that multiply and add pairs of bf16, and fours of bytes
    if dtype in (torch.int8, torch.uint8):
        return "digits" if dot_products else "int8"
    if dtype == torch.bfloat16:
        return "pairs" if dot_products else "half"
    return "full"


def panels(
    weight: Tensor, bias: Tensor | None, scales: Tensor | None, arrangement: str, arrange: Callable[[Tensor], Tensor],
    *, repeats: int = 1, channel: int = 0, first_scale: int = 0, group: int = 0, groups: int = 1,
) -> Panels:  # fmt: skip
    """Pack arrange(weight) [outputs, taps, channels] in panels, with bias and scales repeated `repeats` times.

    The result is cached with the weight under the name of the `arrangement`. `channel` is the dimension of the output
    channels in `weight`, whose scales begin at `first_scale`. Of the `groups` of a grouped convolution, which divide
    the first dimension of weight and bias, only number `group` is packed.
    """

    def pack(weight: Tensor, bias: Tensor | None) -> Panels:
        weight, bias = weight.chunk(groups)[group], None if bias is None else bias.chunk(groups)[group]
        count = weight.shape[channel]
        own_scales = None if scales is None else scales[first_scale + group * count :][:count]
        integers = quantized.integers(weight, own_scales, channel)
        packed = in_panels(arrange(weight if integers is None else integers))
        steps = None if integers is None or own_scales is None else per_output(own_scales.repeat(repeats))
        packed_bias = None if bias is None else per_output(bias.repeat(repeats))
        outputs, taps, _ = arrange(weight).shape
        structure = Weights(
            packed.data_ptr(), outputs, taps, address(packed_bias), address(steps), packed.element_size()
        )
        return Panels((packed, packed_bias, steps), structure, KINDS[kind_of(packed.dtype)])

    # Scales decide how a weight is packed and not what it is: equal ones in another tensor need no packing.
    layout = f"{arrangement} {native().name} {group}/{groups} {scales is not None}"
    return packing.packed((weight, bias), layout, pack)


def in_panels(weight: Tensor) -> Tensor:
    """Zero-pad [outputs, taps, channels] and pack it as [panels, taps, channels / G, outputs per panel, G].

    G is the number of channels that an instruction multiplies at once. Weights of kind 'digits' are stored as unsigned
    bytes, with 128 added (native/digits.h).
    """
    width, kind = native().outputs_per_panel, kind_of(weight.dtype)
    group = {"pairs": 2, "digits": 4}.get(kind, 1)
    _, taps, channels = weight.shape
    weight = F.pad(weight, (0, -channels % group, 0, 0, 0, -weight.shape[0] % width))
    weight = weight.view(-1, width, taps, weight.shape[2] // group, group)
    packed = weight.permute(0, 2, 3, 1, 4).contiguous()
    return (packed.to(torch.int16) + 128).to(torch.uint8) if kind == "digits" else packed


def per_output(values: Tensor) -> Tensor:
    """One value per output as fp32, zero-padded to whole panels."""
    return F.pad(values.float(), (0, -len(values) % native().outputs_per_panel))
