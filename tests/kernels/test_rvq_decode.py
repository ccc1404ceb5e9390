"""rvq_decode, each implementation, against one-hot products."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import noise, relative_error
from fastmimi.reference.rvq_decode import rvq_decode as reference


@pytest.mark.parametrize("levels", [1, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_sum_of_entries(op, levels, rows):
    codebooks = noise(levels, 32, 8)
    codes = torch.randint(0, 32, (levels, rows), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    codes = codes.to(codebooks.device)
    truth = torch.einsum("lns,lsd->nd", F.one_hot(codes, 32).double(), codebooks.double())
    assert relative_error(op(codes, codebooks), truth) < 1e-6


def test_fewer_codes_than_codebooks(op):
    codebooks = noise(4, 32, 8)
    codes = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(op(codes, codebooks), op(codes, codebooks[:2]))


def test_the_models_shape_is_bit_identical(op):
    codebooks = noise(31, 2048, 256)
    codes = (torch.arange(31 * 40) * 7919 % 2048).view(40, 31).t()  # not contiguous
    assert torch.equal(op(codes, codebooks), reference(codes, codebooks))


def test_gradients_match_the_reference(op):
    codebooks = noise(3, 16, 8).requires_grad_()
    codes = torch.arange(12).view(3, 4)
    grads = [torch.autograd.grad(f(codes, codebooks).square().sum(), codebooks)[0] for f in (op, reference)]
    assert torch.equal(*grads)


def test_rounded_once_at_the_end(op):
    codebooks = noise(8, 32, 19)
    codes = torch.arange(8 * 30).view(8, 30) * 7 % 32
    mine = op(codes, codebooks, dtype=torch.bfloat16)
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, reference(codes, codebooks).bfloat16())
