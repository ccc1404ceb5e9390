"""CPU kernel for `rvq_encode`: all levels in one call, with near ties decided in fp64 (native/rvq.h).

Each level's distances are computed by the GEMM, which keeps the two nearest entries of each row and writes no distance
matrix. With one row (a stream), time goes into reading the codebooks, 2 MB per level, and threads divide the entries of
each level. With many rows, it goes into arithmetic, 1 MFLOP per row and level, and threads divide the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import packing
from .._common import check_search
from ._abi import DTYPES
from ._native import native


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D] fp32 or bf16, computed in fp32, and codebooks [L, S, D] fp32 -> codes [L, N] int64."""
    if x.dtype not in DTYPES or codebooks.dtype != torch.float32:
        raise TypeError(f"x must be float32 or bfloat16 and codebooks float32, got {x.dtype} and {codebooks.dtype}")
    codebooks = codebooks.contiguous()
    levels, size, dim = codebooks.shape
    check_search(x, codebooks)
    width = native().outputs_per_panel
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(levels, len(x), dtype=torch.int64)

    def pack(books: Tensor) -> tuple[Tensor, Tensor]:
        norms = F.pad(books.square().sum(dim=-1), (0, -size % width), value=torch.inf)
        books = F.pad(books, (0, 0, 0, -size % width)).view(levels, -1, width, dim)
        return books.transpose(2, 3).contiguous(), norms

    packed, norms = packing.packed(codebooks, f"search in panels of {width}", pack)
    native().keep(x, codebooks, packed, norms, codes)
    if codes.numel():
        native().rvq_encode(
            x.data_ptr(), DTYPES[x.dtype], x.stride(0), len(x), dim, levels, size, codebooks.data_ptr(),
            packed.data_ptr(), norms.data_ptr(), codes.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return codes
