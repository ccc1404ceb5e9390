"""Triton kernel for `rvq_encode`: the nearest-entry searches of all levels in one launch.

    code_l = argmin_s |c_{l,s}|^2 - 2 r_l . c_{l,s},      r_{l+1} = r_l - c_{l,code_l}

A program takes its rows through all levels. At each level it goes through the codebook in tiles, with the products on
the tensor cores, and keeps the two lowest scores of each row and their entries; no [N, S] matrix is written to memory.
For N rows, L levels and S entries of dimension D, the reference writes and reads 2 L N S floats of scores. This kernel
reads and writes N D floats of residuals and, from the L2 cache, S D floats of codebook per program and level.

The result is exact: scores from the tensor cores (three TF32 products) have errors of about 1e-6, so the two best
entries are compared again by sum_d (r_d - c_d)^2 in fp64, and the nearer one wins, or the first on a tie. The residual
is subtracted in fp32, as in the reference.

The residuals are in a scratch buffer [N, D]. A program reads its rows block by block, as it reads the codebook, and
they stay in its caches from one level to the next. Kept in registers, 64 rows of 256 dimensions and their TF32 parts
spilled 1.4 to 16 KB per thread (compiled for sm_80, sm_90 and sm_100), and the 1028 dimensions of JODIO would not fit
at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing
from .._common import check_search
from . import _launch

FAR = tl.constexpr(float("inf"))
BLOCKS = {  # keyed by whether there are more than 16 rows
    False: {"BLOCK_N": 16, "BLOCK_S": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
    True: {"BLOCK_N": 64, "BLOCK_S": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def best_two(score, s, best, code, second, runner_up):
    """Update the two lowest scores of each row, and their entries, with score [BLOCK_N, BLOCK_S] of entries s.

    Of equal scores, the one with the lower index is ranked first.
    """
    none: tl.constexpr = 2147483647
    for _ in tl.static_range(2):
        low = tl.min(score, axis=1)
        at = tl.min(tl.where(score == low[:, None], s[None, :], none), axis=1)  # the first of equal scores
        score = tl.where(s[None, :] == at[:, None], FAR, score)
        first = low < best
        later = low < second
        second = tl.where(first, best, tl.where(later, low, second))
        runner_up = tl.where(first, code, tl.where(later, at, runner_up))
        best = tl.where(first, low, best)
        code = tl.where(first, at, code)
    return best, code, second, runner_up


@triton.jit(do_not_specialize=["N", "L"])
def rvq_encode_fwd_kernel(
    p_r, p_books, p_norms, p_codes, N, L, S, units,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    D = units * UNIT  # tells the compiler that rows start at multiples of 16 bytes
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = n < N
    d = tl.arange(0, BLOCK_D)
    p_rows = p_r + n[:, None] * D + d[None, :]  # the residual; at first it is x
    for level in range(L):
        p_book = p_books + level * S * D
        best = tl.full([BLOCK_N], FAR, tl.float32)
        second = tl.full([BLOCK_N], FAR, tl.float32)
        code = tl.zeros([BLOCK_N], tl.int32)
        runner_up = tl.zeros([BLOCK_N], tl.int32)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            p_entries = p_book + s[None, :] * D + d[:, None]  # [BLOCK_D, BLOCK_S]
            dots = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
            for d0 in range(0, D, BLOCK_D):
                m_d = d0 + d < D
                b_r = tl.load(p_rows + d0, mask=m_n[:, None] & m_d[None, :], other=0.0)
                b_c = tl.load(p_entries + d0, mask=m_d[:, None] & (s < S)[None, :], other=0.0)
                dots = tl.dot(b_r, b_c, dots, input_precision=PRECISION)
            norm = tl.load(p_norms + level * S + s, mask=s < S, other=FAR)
            best, code, second, runner_up = best_two(norm[None, :] - 2.0 * dots, s, best, code, second, runner_up)
        runner_up = tl.where(second < FAR, runner_up, code)  # a codebook with a single entry

        best_distance = tl.zeros([BLOCK_N], tl.float64)
        second_distance = tl.zeros([BLOCK_N], tl.float64)
        for d0 in range(0, D, BLOCK_D):
            m = m_n[:, None] & (d0 + d < D)[None, :]
            b_r = tl.load(p_rows + d0, mask=m, other=0.0)
            p_d = p_book + (d0 + d)[None, :]
            gap = (b_r - tl.load(p_d + code[:, None] * D, mask=m, other=0.0)).to(tl.float64)
            best_distance += tl.sum(gap * gap, axis=1)
            gap = (b_r - tl.load(p_d + runner_up[:, None] * D, mask=m, other=0.0)).to(tl.float64)
            second_distance += tl.sum(gap * gap, axis=1)
        tie = (second_distance == best_distance) & (runner_up < code)
        code = tl.where((second_distance < best_distance) | tie, runner_up, code)
        tl.store(p_codes + level * N + n, code.to(tl.int64), mask=m_n)

        tl.debug_barrier()  # all threads have read the residuals
        for d0 in range(0, D, BLOCK_D):
            m = m_n[:, None] & (d0 + d < D)[None, :]
            b_c = tl.load(p_book + code[:, None] * D + (d0 + d)[None, :], mask=m, other=0.0)
            tl.store(p_rows + d0, tl.load(p_rows + d0, mask=m, other=0.0) - b_c, mask=m)
        tl.debug_barrier()  # other threads read these residuals next


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D], converted to fp32, and codebooks [L, S, D] fp32 -> codes [L, N] int64."""
    check_search(x, codebooks)
    (rows, dim), (levels, size, _) = x.shape, codebooks.shape
    codes = torch.empty(levels, rows, dtype=torch.int64, device=x.device)
    if not rows:
        return codes
    codebooks = codebooks.contiguous()
    tile = BLOCKS[rows > 16]
    unit = 4 if dim % 4 == 0 else 1
    _launch.launch(
        "rvq_encode", rvq_encode_fwd_kernel, (triton.cdiv(rows, tile["BLOCK_N"]),),
        x.to(codebooks.dtype, copy=True, memory_format=torch.contiguous_format), codebooks, _norms(codebooks), codes,
        rows, levels, size, dim // unit, UNIT=unit, PRECISION=_launch.precision(codebooks), **tile,
    )  # fmt: skip
    return codes


def _norms(codebooks: Tensor) -> Tensor:
    """|c|^2 [L, S]."""
    return packing.packed(codebooks, "norms", lambda books: books.square().sum(dim=-1))
