"""Reference of `rvq_decode`: the sum over levels of the chosen codebook entries."""

from torch import Tensor


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] -> [N, D] in the codebooks' dtype; levels are added in order."""
    total = codebooks[0][codes[0]]
    for codebook, code in zip(codebooks[1:], codes[1:], strict=False):
        total = total + codebook[code]
    return total
