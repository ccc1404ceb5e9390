"""Reference for `rvq_encode`: residual vector quantization, the nearest codebook entry at each level.

    code_l = argmin_s |r_l - c_{l,s}|^2 = argmin_s |c_{l,s}|^2 - 2 r_l . c_{l,s},    r_{l+1} = r_l - c_{l,code_l}

with r_0 = x. The search is in fp32 (fp64 for an fp64 model); of equally near entries, the one with the lowest index is
chosen. Follows transformers' `MimiEuclideanCodebook`.
"""

import torch
from torch import Tensor

ROWS = 8192  # rows per distance matrix: [ROWS, S] fp32 is 64 MiB at S = 2048


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D] and codebooks [L, S, D] -> codes [L, N] int64; computed in the dtype of the codebooks."""
    norms = codebooks.square().sum(dim=-1)  # [L, S]
    return torch.cat([encode_rows(rows, codebooks, norms) for rows in x.to(codebooks.dtype).split(ROWS)], dim=1)


def encode_rows(residual: Tensor, codebooks: Tensor, norms: Tensor) -> Tensor:
    codes = []
    for codebook, norm in zip(codebooks, norms, strict=True):
        code = torch.addmm(norm, residual, codebook.t(), alpha=-2).argmin(dim=-1)  # [N]
        residual = residual - codebook[code]
        codes.append(code)
    return torch.stack(codes)
