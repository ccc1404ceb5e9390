"""`rvq_encode` by oneDNN: distances are products with -2 C, laid out once, that begin at |C|^2."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import packing
from ._prepacked import lay_out, linear, unsupported  # noqa: F401

ROWS = 8192  # rows per distance matrix: [ROWS, S] fp32 is 64 MB at S = 2048


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D], computed in fp32, and codebooks [L, S, D] fp32 -> codes [L, N] int64."""
    if codebooks.dtype != torch.float32:
        raise TypeError(f"the search is fp32, got codebooks of {codebooks.dtype}")
    codes = torch.empty(len(codebooks), len(x), dtype=torch.int64)
    products, norms = packing.packed(codebooks, "onednn search", _pack)
    for residual, found in zip(x.float().split(ROWS), codes.split(ROWS, dim=1), strict=True):
        for level, book in enumerate(codebooks):
            code = linear(residual, products[level], norms[level]).argmin(dim=-1)
            residual = residual - book[code]
            found[level] = code
    return codes


def _pack(codebooks: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    return [lay_out(-2 * book) for book in codebooks], codebooks.square().sum(dim=-1)
