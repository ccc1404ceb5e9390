"""Triton kernel for `rvq_decode`: the sum over levels of the chosen entries in one launch.

    y[n, d] = sum_l codebooks[l, codes[l, n], d]

Levels are added in the order of the reference, so the results are bitwise equal. The running sum stays in registers;
the reference writes and reads it at each level, three times the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_codes
from . import _launch


@triton.jit(do_not_specialize=["N", "L", "sc_l", "sc_n"])
def rvq_decode_fwd_kernel(p_codes, p_books, p_y, N, L, S, D, sc_l, sc_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.cdiv(D, BLOCK_D)
    n = (tl.program_id(0) // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(0) % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (n < N)[:, None] & (d < D)[None, :]
    n = n.to(tl.int64)
    b_y = tl.zeros([BLOCK_N, BLOCK_D], dtype=p_books.dtype.element_ty)
    for level in range(L):
        code = tl.load(p_codes + level * sc_l + n * sc_n, mask=n < N, other=0)  # int64
        exists = (code >= 0) & (code < S)  # an invalid code reads no memory and adds 0
        p_rows = p_books + (level * S + code)[:, None] * D + d[None, :]
        b_y += tl.load(p_rows, mask=m & exists[:, None], other=0.0)
    tl.store(p_y + n[:, None] * D + d[None, :], b_y, mask=m)


def rvq_decode(codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """codes [L, N] int64 and codebooks [L, S, D] -> [N, D] in `dtype`, by default the codebooks'."""
    check_codes(codes, codebooks)
    (levels, rows), (_, size, dim) = codes.shape, codebooks.shape
    y = codebooks.new_empty(rows, dim, dtype=dtype)
    if not rows:
        return y
    block_d = min(128, triton.next_power_of_2(dim))
    _launch.launch(
        "rvq_decode", rvq_decode_fwd_kernel, (triton.cdiv(rows, 16) * triton.cdiv(dim, block_d),),
        codes, codebooks.contiguous(), y, rows, levels, size, dim, codes.stride(0), codes.stride(1),
        BLOCK_N=16, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return y
