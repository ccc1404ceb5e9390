"""resblock, each implementation, against the same chain of PyTorch modules in fp64, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference.resblock import resblock as reference


def case(dilation, shortcut, dtype=torch.float32):
    weights = [noise(4, 8, 3, seed=1), noise(4, seed=2), noise(8, 4, 1, seed=3), noise(8, seed=4)]
    skip = {"shortcut_weight": noise(8, 8, 1, seed=5), "shortcut_bias": noise(8, seed=6)} if shortcut else {}
    return [w.to(dtype) for w in weights], {k: v.to(dtype) for k, v in skip.items()}, 2 * dilation


@pytest.mark.parametrize("dilation", [1, 2, 9])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("length", [1, 31])
def test_whole(op, dilation, shortcut, length):
    x = noise(2, 8, length)
    weights, skip, left = case(dilation, shortcut)
    w1, b1, w2, b2 = (w.double() for w in weights)
    wide = x.double()
    hidden = F.conv1d(F.pad(F.elu(wide), (left, 0)), w1, b1, dilation=dilation)
    truth = F.conv1d(F.elu(hidden), w2, b2)
    truth += F.conv1d(wide, *(t.double() for t in skip.values())) if shortcut else wide
    options = {"dilation": dilation, "pad": (left, 0), **skip}
    assert relative_error(op(x, *weights, **options), truth) < 1e-6
    assert relative_error(op(x, *weights, post="elu", **options), F.elu(truth)) < 1e-6


@pytest.mark.parametrize("dilation", [1, 5])
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_chunks_equal_the_whole_and_masked_rows_stay(op, dilation, mode):
    x = noise(3, 8, 40)
    weights, skip, left = case(dilation, True)
    options = {"dilation": dilation, "pad": (left, 0), "pad_mode": mode, **skip}
    whole = op(x, *weights, **options)
    history = torch.zeros(3, left, 8)
    history[2] = 7.0
    active, outputs = torch.tensor([True, True, False]), []
    for i, chunk in enumerate(x.split([1, 9, 30], dim=-1)):
        first = torch.full((3,), i == 0)
        outputs.append(op(chunk, *weights, history=history, first=first, active=active, **options))
    assert relative_error(torch.cat(outputs, dim=-1)[:2], whole[:2]) < 1e-6
    assert (history[2] == 7.0).all()


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_models_shapes(op, channels, dtype):
    half = channels // 2
    shapes = [(1, channels, 70), (half, channels, 3), (half,), (channels, half, 1), (channels,)]
    inputs = [
        noise(*shape, seed=i, scale=0.1 if len(shape) == 3 and i else 0.3).to(dtype) for i, shape in enumerate(shapes)
    ]
    assert_as_exact(op, reference, inputs, longest=3 * channels, pad=(2, 0))


@pytest.mark.parametrize("batch, sizes", [(40, [1, 1, 2]), (3, [130, 1])])
def test_many_streams_at_once(op, batch, sizes):
    x, (weights, _, left) = noise(batch, 8, sum(sizes), seed=9), case(3, False)
    active, first = torch.arange(batch) % 3 != 1, torch.arange(batch) % 2 == 0
    history, kept = noise(batch, left, 8, seed=3), noise(batch, left, 8, seed=3)
    for chunk in x.split(sizes, dim=-1):
        options = {"dilation": 3, "pad": (left, 0), "pad_mode": "replicate", "first": first, "active": active}
        mine = op(chunk, *weights, history=history, **options)
        assert relative_error(mine, reference(chunk, *weights, history=kept, **options)) < 1e-6
        assert torch.equal(history, kept)
        first = first & False


def test_non_contiguous_input(op):
    weights, _, left = case(1, False)
    x = noise(2, 8, 9)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(op(strided, *weights, pad=(left, 0)), op(x, *weights, pad=(left, 0))) < 1e-6


def test_gradients_match_the_reference(op):
    weights, skip, left = case(2, True)
    inputs = [t.requires_grad_() for t in (noise(2, 8, 11), *weights, *skip.values())]
    results = []
    for f in (op, reference):
        options = dict(zip(skip, inputs[5:], strict=True))
        y = f(*inputs[:5], dilation=2, pad=(left, 0), **options)
        results.append(torch.autograd.grad(y, inputs, noise(*y.shape, seed=5)))
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_gradients_of_the_reference():
    weights, skip, left = case(2, True, torch.double)
    inputs = [t.requires_grad_() for t in (noise(1, 8, 5).double(), *weights)]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, dilation=2, pad=(left, 0), **skip), inputs)
