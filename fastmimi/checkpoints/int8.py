"""State dicts whose large weights are stored as int8: `name`, int8, and `name.scale`, float32, which broadcasts to it.

A scale has 16 significant bits, so that its products with int8 are exact in float32: what is loaded is the same to the
bit on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import InputError, named
from ..runtime.quantized import round_to_grid

SUFFIX = ".scale"


def quantize(state: Mapping[str, Tensor], names: Mapping[str, int]) -> dict[str, Tensor]:
    """The state dict with the tensors in `names` as int8 and scales, one for each index of the dimension given there.

    All others become float16.
    """
    stored = {name: tensor.half().contiguous() for name, tensor in state.items() if name not in names}
    for name, channel in names.items():
        tensor = state[name].float()
        values, scales = round_to_grid(tensor, channel)
        scales = scales.view([-1 if d == channel else 1 for d in range(tensor.dim())])
        whole = torch.where(scales > 0, values / scales, 0).round()
        stored |= {name: whole.to(torch.int8).contiguous(), name + SUFFIX: scales}
    return stored


def dequantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with float32 tensors in place of int8 ones and their scales; others are returned as they are.

    Raises InputError if the scales of a tensor do not fit it.
    """
    plain = dict(state)
    for name in _quantized(state):
        tensor, scale = plain[name], plain.pop(name + SUFFIX)
        fits = scale.dim() == tensor.dim() and all(s in (1, t) for s, t in zip(scale.shape, tensor.shape, strict=True))
        if scale.dtype != torch.float32 or not fits:
            raise InputError(
                f"{named(name + SUFFIX)} must be float32 and broadcast to {tuple(tensor.shape)}, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )
        plain[name] = tensor.float() * scale
    return plain


def _quantized(state: Mapping[str, Tensor]) -> Iterable[str]:
    return [name for name, tensor in state.items() if tensor.dtype == torch.int8 and name + SUFFIX in state]
