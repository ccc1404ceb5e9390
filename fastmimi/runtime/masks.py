"""Masks that users pass: bool tensors, numpy arrays or lists."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError


def as_tensor(mask: object, name: str) -> Tensor:
    """A mask as a tensor; it may be a tensor, a numpy array or nested lists. Raises InputError naming the argument."""
    if not isinstance(mask, Tensor) and isinstance(mask, (np.ndarray, list, tuple)):  # a union cannot be traced
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"{name} must be a mask of numbers or bools, got a {type(mask).__name__} ({reason})"
            ) from None
    if not isinstance(mask, Tensor):
        raise InputError(f"{name} must be a tensor, a numpy array or a list of bools, got {type(mask).__name__}")
    if mask.is_complex() or mask.device.type == "meta" or mask.layout != torch.strided:
        raise InputError(f"{name} must hold bools or real numbers, got {mask.dtype} on {mask.device} ({mask.layout})")
    return mask


def of_streams(mask: object, name: str, batch_size: int) -> Tensor:
    """The bool tensor [batch_size] of a mask of streams."""
    mask = as_tensor(mask, name)
    if mask.shape != (batch_size,) or mask.dtype != torch.bool:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise InputError(f"{name} must be a bool tensor of shape ({batch_size},), got {got}")
    return mask
