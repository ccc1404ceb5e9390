"""Weights as the native library reads them: panels of outputs next to each other (native/gemm.h), made once and kept.

fp32 weights stay fp32, but where they lie on a grid that eight bits hold (fastmimi/runtime/quantized.py) they become
int8: no bit is lost. bf16 weights stay bf16, in pairs of channels where the processor multiplies those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import packing, quantized
from ._native import DTYPES, KINDS, Weights, native


class Panels(NamedTuple):
    """Packed weights and bias of a product, and the structure of their addresses."""

    tensors: tuple[Tensor | None, ...]  # kept alive for `structure`
    structure: Weights
    kind: int


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def agree(*tensors: Tensor | None) -> None:
    """Raise TypeError unless all tensors are of one dtype that the library computes in: it gets bare addresses."""
    kinds = {t.dtype for t in tensors if t is not None}
    if len(kinds) != 1 or not kinds <= DTYPES.keys():
        raise TypeError(f"tensors must all be float32 or all bfloat16, got {', '.join(sorted(map(str, kinds)))}")


def fits(name: str, state: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a state has the shape that the library will assume, and is contiguous."""
    if state.shape != shape or not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous and {shape}, got {tuple(state.shape)}")


def multiplies(x: Tensor, channels: int, outputs: int, bias: Tensor | None) -> None:
    """Raise ValueError unless x [B, C, T] and a bias [C_out] are as long as the weights say."""
    if x.shape[1] != channels:
        raise ValueError(f"x must have the {channels} channels of the weight, got {x.shape[1]}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},), got {tuple(bias.shape)}")


def kind_of(dtype: torch.dtype) -> str:
    multiplies = native().name == "avx512bf16"  # bf16 in pairs, bytes in fours
    if dtype in (torch.int8, torch.uint8):
        return "digits" if multiplies else "int8"
    if dtype == torch.bfloat16:
        return "pairs" if multiplies else "half"
    return "full"


def panels(
    weight: Tensor, bias: Tensor | None, form: str, arrange: Callable[[Tensor], Tensor], *,
    repeats: int = 1, channel: int = 0, rounded: bool = True, group: int = 0, groups: int = 1,
) -> Panels:  # fmt: skip
    """arrange(weight) [outputs, taps, channels] in panels, with the bias `repeats` times; kept with the weight.

    Weights on a grid along `channel`, the outputs, become int8 unless `rounded` is False. Of a grouped convolution,
    whose groups divide the first dimension of the weight and the bias, only the rows of `group` are taken.
    """

    def pack(weight: Tensor, bias: Tensor | None = None) -> Panels:
        weight, bias = weight.chunk(groups)[group], None if bias is None else bias.chunk(groups)[group]
        packed, steps = packed_weight(weight, arrange, channel if rounded else None)
        values = None if bias is None else in_row(bias.repeat(repeats))
        outputs, taps, _ = arrange(weight).shape
        pointers = (packed.data_ptr(), outputs, taps, address(values), address(steps), packed.element_size())
        return Panels((packed, values, steps), Weights(*pointers), KINDS[kind_of(packed.dtype)])

    tensors = (weight,) if bias is None else (weight, bias)
    return packing.packed(tensors, f"{form} {native().name} {rounded} {group}/{groups}", pack)


def packed_weight(
    weight: Tensor, arrange: Callable[[Tensor], Tensor], channel: int | None
) -> tuple[Tensor, Tensor | None]:
    """The panels of arrange(weight), and if they are integers of a grid along `channel`, the step of each output."""
    found = None if channel is None else quantized.integers(weight, channel)
    if found is None:
        return in_panels(arrange(weight)), None
    whole, steps = map(arrange, found)
    return in_panels(whole), in_row(steps.amax((1, 2)))  # a tap that `arrange` filled up has no step


def in_panels(weight: Tensor) -> Tensor:
    """[outputs, taps, channels] -> [panels, taps, channels / G, outputs of a panel, G], zeros beyond the last of each.

    G is how many channels the kind multiplies at once. Digits' weights are stored with 128 added, as unsigned bytes.
    """
    width, kind = native().outputs_per_panel, kind_of(weight.dtype)
    group = {"pairs": 2, "digits": 4}.get(kind, 1)
    _, taps, channels = weight.shape
    weight = F.pad(weight, (0, -channels % group, 0, 0, 0, -weight.shape[0] % width))
    weight = weight.view(-1, width, taps, weight.shape[2] // group, group)
    packed = weight.permute(0, 2, 3, 1, 4).contiguous()
    return (packed.to(torch.int16) + 128).to(torch.uint8) if kind == "digits" else packed


def in_row(values: Tensor) -> Tensor:
    """A value per output in fp32, zeros beyond the last to a full panel."""
    return F.pad(values.float(), (0, -len(values) % native().outputs_per_panel))
