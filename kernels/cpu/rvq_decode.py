"""CPU kernel for `rvq_decode`: the sum over levels in one pass (native/rvq.h).

The running sum stays in registers; the reference writes and reads it once per level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import check_codes
from ._abi import DTYPES
from ._native import native


def rvq_decode(codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] fp32 -> [N, D] in `dtype`, fp32 or bf16; by default fp32."""
    (levels, rows), (_, size, dim) = codes.shape, codebooks.shape
    y = codebooks.new_empty(rows, dim, dtype=dtype)
    if codebooks.dtype != torch.float32 or y.dtype not in DTYPES:
        raise TypeError(
            f"codebooks must be float32 and the result float32 or bfloat16, got {codebooks.dtype} and {y.dtype}"
        )
    check_codes(codes, codebooks)
    codebooks = codebooks.contiguous()
    native().keep(codes, codebooks, y)
    if y.numel():
        native().rvq_decode(
            codes.data_ptr(), codes.stride(0), codes.stride(1), codebooks.data_ptr(), levels, rows, size, dim,
            y.data_ptr(), DTYPES[y.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y
