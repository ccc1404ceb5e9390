"""CPU kernel of `rvq_decode`: PyTorch's own bag of embeddings over all levels, which sums as it gathers.

In place of the reference's chain, which writes and reads the running sum once for each level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import unsupported  # noqa: F401


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] -> [N, D] in the codebooks' dtype."""
    levels, (_, size, dim) = len(codes), codebooks.shape
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise IndexError(f"codes must lie in [0, {size}), got {int(codes.min())} to {int(codes.max())}")
    entries = codes.t() + torch.arange(levels) * size  # [N, L]
    return F.embedding_bag(entries, codebooks.reshape(-1, dim), mode="sum")
