"""Reference for `rvq_decode`: the sum over levels of the chosen codebook entries."""

import torch
from torch import Tensor


def rvq_decode(codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] -> [N, D] in `dtype`, by default that of the codebooks.

    Levels are added in order, in the dtype of the codebooks.
    """
    total = codebooks[0][codes[0]]
    for codebook, code in zip(codebooks[1:], codes[1:], strict=False):
        total = total + codebook[code]
    return total if dtype is None else total.to(dtype)
