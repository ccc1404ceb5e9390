"""The reference of resblock against the same chain of PyTorch modules in fp64, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.reference.resblock import resblock
from fastmimi.testing import noise, relative_error


def case(dilation, shortcut, dtype=torch.float32):
    weights = [noise(4, 8, 3, seed=1), noise(4, seed=2), noise(8, 4, 1, seed=3), noise(8, seed=4)]
    skip = {"shortcut_weight": noise(8, 8, 1, seed=5), "shortcut_bias": noise(8, seed=6)} if shortcut else {}
    return [w.to(dtype) for w in weights], {k: v.to(dtype) for k, v in skip.items()}, 2 * dilation


@pytest.mark.parametrize("dilation", [1, 2, 9])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("length", [1, 31])
def test_whole(dilation, shortcut, length):
    x = noise(2, 8, length)
    weights, skip, left = case(dilation, shortcut)
    w1, b1, w2, b2 = (w.double() for w in weights)
    wide = x.double()
    hidden = F.conv1d(F.pad(F.elu(wide), (left, 0)), w1, b1, dilation=dilation)
    truth = F.conv1d(F.elu(hidden), w2, b2)
    truth += F.conv1d(wide, *(t.double() for t in skip.values())) if shortcut else wide
    assert relative_error(resblock(x, *weights, dilation=dilation, pad=(left, 0), **skip), truth) < 1e-6


@pytest.mark.parametrize("dilation", [1, 5])
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_chunks_equal_the_whole_and_masked_rows_stay(dilation, mode):
    x = noise(3, 8, 40)
    weights, skip, left = case(dilation, True)
    options = {"dilation": dilation, "pad": (left, 0), "pad_mode": mode, **skip}
    whole = resblock(x, *weights, **options)
    history = torch.zeros(3, 8, left)
    history[2] = 7.0
    active, pieces = torch.tensor([True, True, False]), []
    for i, piece in enumerate(x.split([1, 9, 30], dim=-1)):
        first = torch.full((3,), i == 0)
        pieces.append(resblock(piece, *weights, history=history, first=first, active=active, **options))
    assert relative_error(torch.cat(pieces, dim=-1)[:2], whole[:2]) < 1e-6
    assert (history[2] == 7.0).all()


def test_gradients():
    weights, skip, left = case(2, True, torch.double)
    inputs = [t.requires_grad_() for t in (noise(1, 8, 5).double(), *weights)]
    assert torch.autograd.gradcheck(lambda *a: resblock(*a, dilation=2, pad=(left, 0), **skip), inputs)
