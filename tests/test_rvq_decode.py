"""The reference of rvq_decode against one-hot products."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.reference.rvq_decode import rvq_decode
from fastmimi.testing import noise, relative_error


@pytest.mark.parametrize("levels", [1, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_sum_of_entries(levels, rows):
    codebooks = noise(levels, 32, 8)
    codes = torch.randint(0, 32, (levels, rows), generator=torch.Generator().manual_seed(0))
    truth = torch.einsum("lns,lsd->nd", F.one_hot(codes, 32).double(), codebooks.double())
    assert relative_error(rvq_decode(codes, codebooks), truth) < 1e-6


def test_fewer_codes_than_codebooks():
    codebooks = noise(4, 32, 8)
    codes = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(rvq_decode(codes, codebooks), rvq_decode(codes, codebooks[:2]))
