"""Triton kernel of `rvq_encode`: the whole residual chain of nearest-entry searches in one launch.

    code_l = argmin_s |c_{l,s}|^2 - 2 r_l . c_{l,s},      r_{l+1} = r_l - c_{l,code_l}

A program keeps its rows' residuals on the chip through all levels and runs over each codebook in tiles: products on the
tensor cores, the two best scores and entries so far beside them; no [N, S] matrix in memory. For N rows, L levels, S
entries of D the reference moves 2 L N S floats of scores; this moves N D of residuals and, from the L2 cache, L S D of
codebook per program.

Exact: scores from the tensor cores (three TF32 products) err by some 1e-6, so the two best entries are scored again as
sum_d (r_d - c_d)^2 in fp64, and the nearer wins, the first index on a tie. The residual is subtracted in fp32, as the
reference does. Wide entries (JODIO: D = 1028) do not fit the registers: their residuals lie in a scratch buffer, which
the cache holds, and products and scores run over D in blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import unsupported  # noqa: F401

FAR = tl.constexpr(float("inf"))
WIDEST = 256  # entries up to so many dimensions keep the residual in registers


@triton.jit
def best_two(score, s, best, code, second, runner_up):
    """The two lowest of the running two and of score [BLOCK_N, BLOCK_S]; among equals the lower index s comes first."""
    none: tl.constexpr = 2147483647
    for _ in tl.static_range(2):
        low = tl.min(score, axis=1)
        at = tl.min(tl.where(score == low[:, None], s[None, :], none), axis=1)  # first of equals
        score = tl.where(s[None, :] == at[:, None], FAR, score)
        first = low < best
        later = low < second
        second = tl.where(first, best, tl.where(later, low, second))
        runner_up = tl.where(first, code, tl.where(later, at, runner_up))
        best = tl.where(first, low, best)
        code = tl.where(first, at, code)
    return best, code, second, runner_up


@triton.jit
def rvq_encode_fwd_kernel(
    p_r, p_books, p_norms, p_codes, N, L, S, D,
    HELD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """HELD: BLOCK_D covers D and the residual stays in registers; else p_r [N, D] is scratch."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = n < N
    d = tl.arange(0, BLOCK_D)
    p_rows = p_r + n[:, None] * D + d[None, :]
    b_r = tl.load(p_rows, mask=m_n[:, None] & (d < D)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
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
            if HELD:
                b_c = tl.load(p_entries, mask=(d < D)[:, None] & (s < S)[None, :], other=0.0)
                dots = tl.dot(b_r, b_c, dots, input_precision=PRECISION)
            else:
                for d0 in range(0, D, BLOCK_D):
                    m_d = d0 + d < D
                    b_x = tl.load(p_rows + d0, mask=m_n[:, None] & m_d[None, :], other=0.0)
                    b_c = tl.load(p_entries + d0, mask=m_d[:, None] & (s < S)[None, :], other=0.0)
                    dots = tl.dot(b_x, b_c, dots, input_precision=PRECISION)
            norm = tl.load(p_norms + level * S + s, mask=s < S, other=FAR)
            best, code, second, runner_up = best_two(norm[None, :] - 2.0 * dots, s, best, code, second, runner_up)
        runner_up = tl.where(second < FAR, runner_up, code)  # a codebook of one entry has no second

        near = tl.zeros([BLOCK_N], tl.float64)
        far = tl.zeros([BLOCK_N], tl.float64)
        for d0 in range(0, D, BLOCK_D):
            m_d = m_n[:, None] & (d0 + d < D)[None, :]
            b_x = b_r
            if not HELD:
                b_x = tl.load(p_rows + d0, mask=m_d, other=0.0)
            p_d = p_book + (d0 + d)[None, :]
            a = (b_x - tl.load(p_d + code[:, None] * D, mask=m_d, other=0.0)).to(tl.float64)
            b = (b_x - tl.load(p_d + runner_up[:, None] * D, mask=m_d, other=0.0)).to(tl.float64)
            near += tl.sum(a * a, axis=1)
            far += tl.sum(b * b, axis=1)
        other = (far < near) | ((far == near) & (runner_up < code))
        code = tl.where(other, runner_up, code)
        tl.store(p_codes + level * N + n, code.to(tl.int64), mask=m_n)

        for d0 in range(0, D, BLOCK_D):
            m_d = m_n[:, None] & (d0 + d < D)[None, :]
            b_c = tl.load(p_book + code[:, None] * D + (d0 + d)[None, :], mask=m_d, other=0.0)
            if HELD:
                b_r -= b_c
            else:
                tl.store(p_rows + d0, tl.load(p_rows + d0, mask=m_d, other=0.0) - b_c, mask=m_d)
        if not HELD:
            tl.debug_barrier()  # other threads read these residuals next


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D] and codebooks [L, S, D], both fp32 -> codes [L, N] int64."""
    (rows, dim), (levels, size, _) = x.shape, codebooks.shape
    codes = torch.empty(levels, rows, dtype=torch.int64, device=x.device)
    if not rows:
        return codes
    codebooks = codebooks.contiguous()
    held = dim <= WIDEST
    residual = x.contiguous() if held else x.clone(memory_format=torch.contiguous_format)
    block_d = max(16, triton.next_power_of_2(dim)) if held else 64
    tile = (
        {"BLOCK_N": 16, "BLOCK_S": 64, "num_warps": 4} if rows <= 16 else {"BLOCK_N": 64, "BLOCK_S": 64, "num_warps": 8}
    )
    _launch.launch(
        "rvq_encode", rvq_encode_fwd_kernel, (triton.cdiv(rows, tile["BLOCK_N"]),),
        residual, codebooks, _norms(codebooks), codes, rows, levels, size, dim,
        HELD=held, BLOCK_D=block_d, PRECISION=_launch.precision(x), num_stages=2, **tile,
    )  # fmt: skip
    return codes


def _norms(codebooks: Tensor) -> Tensor:
    """|c|^2 [L, S]."""
    return _launch.packed(codebooks, "norms", lambda books: books.square().sum(dim=-1))
