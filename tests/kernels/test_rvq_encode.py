"""rvq_encode, each implementation, against an exhaustive fp64 search."""

import pytest
import torch

from fastmimi.devtools.testing import assert_nearest, noise
from fastmimi.reference import rvq_encode as module
from fastmimi.reference.rvq_encode import rvq_encode as reference
from fastmimi.runtime.dispatch import implementation


def exhaustive(x, codebooks):
    residual, codes = x.double(), []
    for book in codebooks.double():
        codes.append((residual[:, None] - book).square().sum(-1).argmin(-1))
        residual = residual - book[codes[-1]]
    return torch.stack(codes)


@pytest.mark.parametrize("rows", [0, 1, 5, 100])
@pytest.mark.parametrize("levels, size, dim", [(1, 64, 16), (8, 64, 16), (3, 33, 7), (2, 1, 4), (2, 70, 300)])
def test_nearest_entries(op, rows, levels, size, dim):
    x, codebooks = noise(rows, dim, seed=1), noise(levels, size, dim, seed=2)
    codes = op(x, codebooks)
    assert codes.shape == (levels, rows) and codes.dtype == torch.int64
    assert torch.equal(codes, exhaustive(x, codebooks))


def test_bf16_is_searched_in_fp32(op):
    x, codebooks = noise(20, 16, seed=1).bfloat16(), noise(4, 64, 16, seed=2)
    assert torch.equal(op(x, codebooks), op(x.float(), codebooks))


def test_first_index_wins_a_tie(op):
    book = noise(1, 40, 8)
    book[0, 30] = book[0, 3]
    assert op(book[0, 30:31].clone(), book).item() == 3


def test_first_index_wins_a_tie_across_tiles(op):
    """Equal entries further apart than one tile of the search."""
    book = noise(1, 700, 8)
    book[0, [599, 333, 150, 41]] = book[0, 5].clone()
    assert op(book[0, 5:6].clone(), book).item() == 5


def test_each_entry_is_nearest_to_itself(op):
    book = noise(1, 50, 8)
    assert torch.equal(op(book[0], book)[0], torch.arange(50))


def test_blocks_of_rows_equal_one_block(monkeypatch):
    x, codebooks = noise(50, 8, seed=1), noise(3, 32, 8, seed=2)
    whole = reference(x, codebooks)
    monkeypatch.setattr(module, "ROWS", 7)
    assert torch.equal(reference(x, codebooks), whole)


def test_reference_in_fp64():
    x, codebooks = noise(20, 8, seed=1).double(), noise(3, 32, 8, seed=2).double()
    assert torch.equal(reference(x, codebooks), exhaustive(x, codebooks))


@pytest.mark.parametrize("rows, dim", [(1, 256), (90, 256), (1, 1028), (20, 1028)])
def test_the_models_shape(op, rows, dim):
    x, codebooks = noise(rows, dim, seed=1), noise(4, 2048, dim, seed=2)
    codes = op(x, codebooks)
    assert torch.equal(codes, reference(x, codebooks))
    assert_nearest(codes, x, codebooks)


def test_tight_clusters_far_from_the_origin(op):
    """In fp32, |c|^2 - 2 r.c loses nearly all its digits to cancellation."""
    centers = noise(4, 1, 16, seed=1, scale=10.0)
    book = (centers + noise(4, 16, 16, seed=2, scale=1e-3)).view(1, 64, 16)
    x = book[0, ::3] + noise(22, 16, seed=3, scale=1e-4)
    codes = op(x, book)
    assert (codes[0] // 16 == torch.arange(0, 64, 3) // 16).all()  # compares clusters, not entries


def test_near_ties(op):
    """Rows halfway between two entries: the two distances differ by less than fp32 products resolve."""
    book = noise(1, 128, 64, seed=1)
    a, b = book[0, 0:64], book[0, 64:128]
    x = (a + b) / 2 + (a - b) * torch.linspace(-1e-5, 1e-5, 64)[:, None]
    assert_nearest(op(x, book), x, book)


@pytest.mark.kernels
def test_the_best_two_are_scored_again_in_fp64():
    """Pairs of entries that fp32 scores cannot tell apart: |c|^2 is 1.6e7, their squared distance about 1e-3."""
    op = implementation("rvq_encode", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in range(8):
        book = (1000 + noise(1, 2, 16, seed=seed, scale=1e-2)).to(device)
        x = book[0] + noise(2, 16, seed=100 + seed, scale=1e-3).to(device)
        assert op(x, book).tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_gives_codes_in_range(op, bad):
    x, book = noise(3, 8), noise(2, 16, 8)
    x[1] = bad
    codes = op(x, book)
    assert codes.min() >= 0 and codes.max() < 16
    assert torch.equal(codes[:, ::2], reference(x[::2], book))


def test_input_is_not_modified(op):
    x, book = noise(5, 300), noise(3, 16, 300)
    before = x.clone()
    op(x, book)
    assert torch.equal(x, before)


def test_edited_codebooks_are_used(op):
    x, books = noise(20, 8, seed=1), noise(2, 16, 8, seed=2)
    op(x, books)
    books[:, :8] *= 3
    assert torch.equal(op(x, books), reference(x, books))
