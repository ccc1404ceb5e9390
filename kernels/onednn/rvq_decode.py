"""`rvq_decode` as one embedding bag: unlike in the reference, the running sum is not written once per level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import check_codes


def rvq_decode(codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] fp32 -> [N, D] in `dtype`, by default fp32."""
    levels, size = codes.shape[0], codebooks.shape[1]
    check_codes(codes, codebooks)
    entries = codes + torch.arange(0, levels * size, size)[:, None]  # indices into the concatenated codebooks
    return F.embedding_bag(entries.t(), codebooks.flatten(0, 1), mode="sum").to(dtype or codebooks.dtype)
