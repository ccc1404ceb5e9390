"""`rvq_encode` with oneDNN: distances |c|^2 - 2 r . c are a linear layer with prepacked weights -2 c and bias |c|^2."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import packing
from .._common import check_search
from ._prepacked import linear, prepack

ROWS = 8192  # rows per distance matrix: [ROWS, S] fp32 is 64 MiB at S = 2048


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D], converted to fp32, and codebooks [L, S, D] fp32 -> codes [L, N] int64."""
    if codebooks.dtype != torch.float32:
        raise TypeError(f"codebooks must be float32, got {codebooks.dtype}")
    check_search(x, codebooks)
    codes = torch.empty(len(codebooks), len(x), dtype=torch.int64)
    weights, norms = packing.packed(codebooks, "onednn search", _pack)
    for residual, found in zip(x.float().split(ROWS), codes.split(ROWS, dim=1), strict=True):
        for level, book in enumerate(codebooks):
            code = linear(residual, weights[level], norms[level]).argmin(dim=-1)
            residual = residual - book[code]
            found[level] = code
    return codes


def _pack(codebooks: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    return [prepack(-2 * book) for book in codebooks], codebooks.square().sum(dim=-1)
