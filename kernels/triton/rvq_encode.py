"""Triton kernel for `rvq_encode`: the nearest-entry searches of all levels in one launch.

    code_l = argmin_s |c_{l,s}|^2 - 2 r_l . c_{l,s},      r_{l+1} = r_l - c_{l,code_l}

A program searches one split of each level's entries for one tile of rows. It goes through them in tiles, keeps the two
lowest scores of each row, compares these two again by sum_d (r_d - c_d)^2 in fp64, and stores the nearer entry with its
distance. When all splits of its rows have arrived, every program reads what they found, takes the nearest entry, or the
first on a tie, and subtracts it from its own copy of the residuals, in fp32 as the reference does. The result does not
depend on the order of arrival. No [N, S] matrix of scores is written to memory.

Waiting (`_wait.py`) needs all splits of a tile of rows to run at the same time. Where there are several, the launch is
cooperative, which makes the driver ensure it, with at most one program per multiprocessor. Where programs may not wait,
on AMD GPUs and in Triton's interpreter, each step is a launch of the same kernel, which finds that all have arrived.

Up to 4 rows, a program has one row, with products in fp32, and up to 128 splits share the reading of the codebooks.
Up to 256 rows, tiles of 16 rows by 64 entries run on the tensor cores, above that tiles of 128 by 128; from 67 of these
on (H100) there is a single split and no waiting.

Products on the tensor cores are three TF32 products, r c = r_high c_high + r_high c_low + r_low c_high, with errors of
scores of about 1e-6, which is why two entries are compared again. The parts of the codebooks are packed once, at twice
their size; residuals are split as they are read. The running two lowest scores are kept for each of COLUMNS columns,
in the registers of a thread, and compared across threads once a level: 805 instructions per tile of 128 x 128 and warp
(sm_90), against 1,425 with a reduction of each tile.

Residuals are in scratch memory and are read block by block, as the codebook is. In registers, 64 rows of 256 dimensions
spilled, and the 1028 dimensions of JODIO would not fit at all.

Not done: the products of x with the entries of all levels at once, corrected by c_{k,code} . c_{l,s} for k < l. A table
of these is L^2 S^2 / 2 floats (0.5 GB for 8 levels of 2048, 8 GB for 32); without it, they are L / 2 times the work of
the searches themselves.

**Predicted** for an H100 (2048 entries of 256), from instruction counts and latencies; nothing was measured: one row, 7
levels 18 us, 1 level 3 us, and some 2.5 us for each launch; 100,000 rows, 8 levels 8 ms, bound by reading tiles from
the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing
from ...runtime.arrivals import arrivals
from .._common import check_search
from . import _launch
from ._wait import arrive, leave, wait_for

FAR = tl.constexpr(float("inf"))
NONE = tl.constexpr(2147483647)  # greater than every index
TILES = (  # the most rows that a tile is for, and the tile
    (4, {"BLOCK_N": 1, "BLOCK_S": 16, "BLOCK_D": 256, "COLUMNS": 16, "SPLITS": 128, "num_warps": 8}),
    (256, {"BLOCK_N": 16, "BLOCK_S": 64, "BLOCK_D": 64, "COLUMNS": 32, "SPLITS": 32, "num_warps": 4}),
    (None, {"BLOCK_N": 128, "BLOCK_S": 128, "BLOCK_D": 32, "COLUMNS": 8, "SPLITS": 16, "num_warps": 8}),
)


@triton.jit
def high_part(x):
    """x [fp32] rounded to TF32, which has 13 bits less."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """[N, 2 * S] -> two times [N, S]."""
    return tl.split(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1))


@triton.jit
def keep_two(score, s, best, code, second, runner_up):
    """Update the two lowest scores of each row and column, and their entries, with score [N, S] of entries s [1, S].

    The kept ones are [N, COLUMNS]; entry s belongs to column s % COLUMNS. Of equal scores, the earlier one is ranked
    first. NaN and infinity are never kept.
    """
    if score.shape[1] > best.shape[1]:
        left, right = halves(score)
        s_left, s_right = halves(s)
        best, code, second, runner_up = keep_two(left, s_left, best, code, second, runner_up)
        return keep_two(right, s_right, best, code, second, runner_up)
    else:
        first = score < best
        later = score < second
        second = tl.where(later, tl.where(first, best, score), second)
        runner_up = tl.where(later, tl.where(first, code, s), runner_up)
        best = tl.where(first, score, best)
        code = tl.where(first, s, code)
        return best, code, second, runner_up


@triton.jit
def first_lowest(score, s):
    """The entry of each row's lowest score, [N, S] -> [N]; of equal scores, the lowest entry."""
    return tl.min(tl.where(score == tl.min(score, axis=1)[:, None], s, NONE), axis=1)


@triton.jit
def two_lowest(best, code, second, runner_up):
    """The entries [N] of each row's two lowest scores, from those of each column; the same one twice if it has one."""
    lowest = first_lowest(best, code)
    own = code == lowest[:, None]  # the next lowest is this column's second or another column's best
    return lowest, first_lowest(tl.where(own, second, best), tl.where(own, runner_up, code))


@triton.jit(do_not_specialize=["N", "L", "share", "splits", "first", "last"])
def rvq_encode_fwd_kernel(
    p_x, p_books, p_high, p_low, p_norms, p_r, p_distances, p_found, p_arrivals, p_codes,
    N, L, S, units, share, splits, first, last,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps first to last - 1 of L + 1: step k chooses level k - 1 from what all splits found, and searches level k.

    A launch does all steps, or one of them. x [N, D]; books, high and low [L, S, D]; norms [L, S]; r [splits, N, D];
    distances (fp64) and found [2, splits, N], used in turn, because splits that are ahead search the next level while
    others still choose.
    """
    D = units * UNIT  # tells the compiler that rows start at multiples of 16 bytes
    p_arrivals += tl.program_id(0)
    split = tl.program_id(1)
    s_first, s_end = split * share, min((split + 1) * share, S)  # this split's entries
    n0 = tl.program_id(0).to(tl.int64) * BLOCK_N  # what follows is relative to the first row of the tile
    p_x += n0 * D
    p_r += (split * N + n0) * D  # this split's copy of the residuals
    p_distances += n0
    p_found += n0
    p_codes += n0
    n = tl.arange(0, BLOCK_N)
    m_n = n < N - n0
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, SPLITS)
    rows = tl.minimum(n, N - n0 - 1).to(tl.int32)[:, None] * D + d[None, :]  # past the end, the last row again
    for step in range(first, last):
        if step == 0:
            for d0 in range(0, D, BLOCK_D):
                m_d = (d0 + d < D)[None, :]
                b_x = tl.load(p_x + rows + d0, mask=m_d, other=0.0)
                tl.store(p_r + rows + d0, b_x.to(p_r.dtype.element_ty), mask=m_n[:, None] & m_d)
        else:
            wait_for(p_arrivals, step * splits)
            at = ((step - 1) % 2 * splits + i[None, :]) * N + n[:, None]
            m_i = m_n[:, None] & (i < splits)[None, :]
            distances = tl.load(p_distances + at, mask=m_i, other=FAR)
            code = first_lowest(distances, tl.load(p_found + at, mask=m_i, other=0))
            m_first = m_n & (n * 0 + split == 0)  # Triton 3.9's interpreter refuses `m_n &` a scalar
            tl.store(p_codes + (step - 1) * N + n, code.to(tl.int64), mask=m_first)
            p_entries = p_books + ((step - 1) * S + code[:, None]) * D + d[None, :]
            for d0 in range(0, D, BLOCK_D):
                m_d = (d0 + d < D)[None, :]
                b_r = tl.load(p_r + rows + d0, mask=m_d, other=0.0) - tl.load(p_entries + d0, mask=m_d, other=0.0)
                tl.store(p_r + rows + d0, b_r, mask=m_n[:, None] & m_d)
        tl.debug_barrier()  # other threads read these residuals next

        if step < L:
            bests = tl.full([BLOCK_N, COLUMNS], FAR, tl.float32)
            seconds = tl.full([BLOCK_N, COLUMNS], FAR, tl.float32)
            codes = tl.full([BLOCK_N, COLUMNS], NONE, tl.int32)
            runners_up = tl.full([BLOCK_N, COLUMNS], NONE, tl.int32)
            for s0 in range(s_first, s_end, BLOCK_S):
                s = s0 + tl.arange(0, BLOCK_S)
                tile = (step * S + tl.minimum(s, S - 1)[None, :]) * D + d[:, None]  # [BLOCK_D, BLOCK_S]
                dots = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
                for d0 in range(0, D, BLOCK_D):
                    m_d = d0 + d < D
                    b_r = tl.load(p_r + rows + d0, mask=m_d[None, :], other=0.0)
                    if BLOCK_N > 1 and PRECISION == "tf32x3":
                        b_high = tl.load(p_high + tile + d0, mask=m_d[:, None], other=0.0)
                        b_low = tl.load(p_low + tile + d0, mask=m_d[:, None], other=0.0)
                        r_high = high_part(b_r)
                        dots = tl.dot(b_r - r_high, b_high, dots, input_precision="tf32")
                        dots = tl.dot(r_high, b_low, dots, input_precision="tf32")
                        dots = tl.dot(r_high, b_high, dots, input_precision="tf32")
                    else:
                        b_c = tl.load(p_books + tile + d0, mask=m_d[:, None], other=0.0)
                        if BLOCK_N > 1:
                            dots = tl.dot(b_r, b_c, dots, input_precision=PRECISION)
                        else:
                            dots += tl.sum(tl.trans(b_r) * b_c, axis=0)[None, :]
                norm = tl.load(p_norms + step * S + s, mask=s < S, other=FAR)
                bests, codes, seconds, runners_up = keep_two(
                    norm[None, :] - 2.0 * dots, s[None, :], bests, codes, seconds, runners_up
                )
            code, runner_up = two_lowest(bests, codes, seconds, runners_up)
            code = tl.where(code < NONE, code, s_first)  # no score of this row is finite
            runner_up = tl.where(runner_up < NONE, runner_up, code)

            distance = tl.zeros([BLOCK_N], tl.float64)
            other_distance = tl.zeros([BLOCK_N], tl.float64)
            for d0 in range(0, D, BLOCK_D):
                m_d = (d0 + d < D)[None, :]
                b_r = tl.load(p_r + rows + d0, mask=m_d, other=0.0)
                p_d = p_books + step * S * D + (d0 + d)[None, :]
                gap = (b_r - tl.load(p_d + code[:, None] * D, mask=m_d, other=0.0)).to(tl.float64)
                distance += tl.sum(gap * gap, axis=1)
                gap = (b_r - tl.load(p_d + runner_up[:, None] * D, mask=m_d, other=0.0)).to(tl.float64)
                other_distance += tl.sum(gap * gap, axis=1)
            nearer = (other_distance < distance) | ((other_distance == distance) & (runner_up < code))
            code = tl.where(nearer, runner_up, code)
            distance = tl.where(nearer, other_distance, distance)
            at = (step % 2 * splits + split) * N + n
            tl.store(p_distances + at, tl.where(distance == distance, distance, FAR), mask=m_n)  # no NaN
            tl.store(p_found + at, code, mask=m_n)
            arrive(p_arrivals)
    if last > L:
        leave(p_arrivals, (L + 1) * splits)


def rvq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [N, D], converted to fp32, and codebooks [L, S, D] fp32 -> codes [L, N] int64."""
    check_search(x, codebooks)
    (rows, dim), (levels, size, _) = x.shape, codebooks.shape
    codes = torch.empty(levels, rows, dtype=torch.int64, device=x.device)
    if not rows:
        return codes
    tile = next(tile for most, tile in TILES if most is None or rows <= most)
    row_tiles, splits, share = _divide(rows, size, tile, _launch.programs(x))
    x, codebooks, precision = x.contiguous(), codebooks.contiguous(), _launch.precision(codebooks)
    if tile is TILES[-1][1]:
        x = x.to(codebooks.dtype)  # few rows are converted by the kernel; here that takes registers that it lacks
    parts = tile["BLOCK_N"] > 1 and precision == "tf32x3" and not torch.version.hip
    high, low = _parts(codebooks) if parts else (codebooks, codebooks)
    residuals = torch.empty(splits, rows, dim, dtype=codebooks.dtype, device=x.device)
    distances = torch.empty(2, splits, rows, dtype=torch.float64, device=x.device)
    found = torch.empty(2, splits, rows, dtype=torch.int32, device=x.device)
    counters = arrivals(x, row_tiles)
    unit = 4 if dim % 4 == 0 else 1
    steps = levels + 1 if splits == 1 or _launch.may_wait(x) else 1  # in one launch
    for first in range(0, levels + 1, steps):
        _launch.launch(
            "rvq_encode", rvq_encode_fwd_kernel, (row_tiles, splits),
            x, codebooks, high, low, _norms(codebooks), residuals, distances, found, counters, codes,
            rows, levels, size, dim // unit, share, splits, first, first + steps,
            UNIT=unit, PRECISION=precision, num_stages=3, launch_cooperative_grid=splits > 1 and steps > 1, **tile,
        )  # fmt: skip
    return codes


def _divide(rows: int, size: int, tile: dict[str, int], programs: int) -> tuple[int, int, int]:
    """How many tiles of rows there are, how many splits of entries, and how many entries a split has.

    There are at most as many programs as given, or a single split. No split is empty.
    """
    row_tiles, size_tiles = triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(size, tile["BLOCK_S"])
    splits = max(1, min(programs // row_tiles, tile["SPLITS"]))
    share = triton.cdiv(size_tiles, splits)
    return row_tiles, triton.cdiv(size_tiles, share), share * tile["BLOCK_S"]


def _parts(codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """The codebooks rounded to TF32, as by `high_part`, and the remainders."""

    def pack(books: Tensor) -> tuple[Tensor, Tensor]:
        high = ((books.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        return high, books - high

    return packing.packed(codebooks, "TF32 parts", pack)


def _norms(codebooks: Tensor) -> Tensor:
    """|c|^2 [L, S]."""
    return packing.packed(codebooks, "norms", lambda books: books.square().sum(dim=-1))
