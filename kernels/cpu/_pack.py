"""Weights as the native library reads them: panels of outputs next to each other (native/gemm.h), made once and kept.

fp32 weights stay fp32. bf16 weights stay bf16, in pairs of channels where the processor multiplies those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import memory
from ._native import KINDS, Weights, native


class Panels(NamedTuple):
    """Packed weights of a product, how they are stored, and the structure that points at them."""

    weights: Tensor
    kind: int
    outputs: int
    taps: int

    def structure(self, bias: Tensor | None) -> Weights:
        """For a bias from `row`. The caller keeps both alive while the structure is in use."""
        return Weights(
            self.weights.data_ptr(), self.outputs, self.taps, address(bias), None, self.weights.element_size()
        )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def kind_of(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "full"
    return "pairs" if native().name == "avx512bf16" else "half"


def panels(
    tensors: Tensor | tuple[Tensor, ...], form: str, arrange: Callable[..., Tensor], dtype: torch.dtype
) -> Panels:
    """arrange(tensors) [outputs, taps, channels], packed in `dtype` and kept with the tensors under the name `form`."""
    variant, kind = native(), kind_of(dtype)
    width = variant.outputs_per_panel

    def pack(*tensors: Tensor) -> Panels:
        weight = arrange(*tensors).to(dtype)
        outputs, taps, channels = weight.shape
        group = 2 if kind == "pairs" else 1
        weight = F.pad(weight, (0, -channels % group, 0, 0, 0, -outputs % width))
        weight = weight.view(-1, width, taps, weight.shape[2] // group, group)
        return Panels(weight.permute(0, 2, 3, 1, 4).contiguous(), KINDS[kind], outputs, taps)

    return memory.packed(tensors, f"{form}, {kind}, panels of {width}", pack)


def row(tensor: Tensor | None, repeats: int = 1) -> Tensor | None:
    """A value per output (bias, scale) in fp32, as often as told, and then zeros to a full panel."""
    if tensor is None:
        return None
    width = native().outputs_per_panel

    def pack(tensor: Tensor) -> Tensor:
        values = tensor.float().repeat(repeats)
        return F.pad(values, (0, -len(values) % width))

    return memory.packed(tensor, f"{repeats} rows in panels of {width}", pack)
