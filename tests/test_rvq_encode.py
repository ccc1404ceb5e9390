"""The reference of rvq_encode against exhaustive fp64 search."""

import pytest
import torch

from fastmimi.reference import rvq_encode as module
from fastmimi.reference.rvq_encode import rvq_encode
from fastmimi.testing import noise


def exhaustive(x, codebooks):
    residual, codes = x.double(), []
    for book in codebooks.double():
        codes.append((residual[:, None] - book).square().sum(-1).argmin(-1))
        residual = residual - book[codes[-1]]
    return torch.stack(codes)


@pytest.mark.parametrize("rows", [0, 1, 5, 100])
@pytest.mark.parametrize("levels, size, dim", [(1, 64, 16), (8, 64, 16), (3, 33, 7), (2, 1, 4)])
def test_nearest_entries(rows, levels, size, dim):
    x, codebooks = noise(rows, dim, seed=1), noise(levels, size, dim, seed=2)
    codes = rvq_encode(x, codebooks)
    assert codes.shape == (levels, rows) and codes.dtype == torch.int64
    assert torch.equal(codes, exhaustive(x, codebooks))


def test_first_index_wins_a_tie():
    book = noise(1, 40, 8)
    book[0, 30] = book[0, 3]
    assert rvq_encode(book[0, 30:31].clone(), book).item() == 3


def test_entries_find_themselves():
    book = noise(1, 50, 8)
    assert torch.equal(rvq_encode(book[0], book)[0], torch.arange(50))


def test_many_rows_go_in_parts(monkeypatch):
    x, codebooks = noise(50, 8, seed=1), noise(3, 32, 8, seed=2)
    whole = rvq_encode(x, codebooks)
    monkeypatch.setattr(module, "ROWS", 7)
    assert torch.equal(rvq_encode(x, codebooks), whole)


def test_fp64():
    x, codebooks = noise(20, 8, seed=1).double(), noise(3, 32, 8, seed=2).double()
    assert torch.equal(rvq_encode(x, codebooks), exhaustive(x, codebooks))
