"""The reference of causal_conv_transpose1d against a written-out overlap-add in fp64, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.reference.causal_conv_transpose1d import causal_conv_transpose1d
from fastmimi.testing import noise, relative_error

SHAPES = [(8, 4, 16, 8, 1), (6, 3, 10, 5, 1), (6, 6, 4, 2, 6), (4, 2, 3, 1, 1)]  # in, out, kernel, stride, groups


def case(shape, length, batch=3):
    c_in, c_out, kernel, stride, groups = shape
    x, weight = noise(batch, c_in, length, seed=1), noise(c_in, c_out // groups, kernel, seed=2)
    return x, weight, noise(c_out, seed=3), {"stride": stride, "groups": groups}, kernel - stride


def overlap_add(x, weight, bias, stride, groups):
    """sum over t and k of weight[:, :, k] applied to x[:, :, t], at t * stride + k."""
    x, weight = x.double(), weight.double()
    kernel, length = weight.shape[2], x.shape[2]
    y = torch.zeros(x.shape[0], bias.shape[0], (length - 1) * stride + kernel, dtype=torch.double)
    per_group = x.shape[1] // groups
    for t in range(length):
        for k in range(kernel):
            parts = [
                torch.einsum("bc,co->bo", x[:, g * per_group : (g + 1) * per_group, t],
                             weight[g * per_group : (g + 1) * per_group, :, k])
                for g in range(groups)
            ]  # fmt: skip
            y[:, :, t * stride + k] += torch.cat(parts, dim=1)
    return y + bias.double()[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("left", [0, 1])
def test_whole(shape, length, left):
    x, weight, bias, options, tail = case(shape, length)
    truth = overlap_add(F.elu(x.double()), weight, bias, **options)
    mine = causal_conv_transpose1d(x, weight, bias, trim=(left, tail - left), pre="elu", **options)
    assert mine.shape[-1] == length * options["stride"]
    assert relative_error(mine, truth[..., left : left + mine.shape[-1]]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_whole_and_masked_rows_stay(shape):
    x, weight, bias, options, tail = case(shape, 12)
    whole = causal_conv_transpose1d(x, weight, bias, trim=(0, tail), pre="elu", **options)
    overlap = torch.zeros(3, bias.shape[0], tail)
    overlap[2] = 7.0
    active = torch.tensor([True, True, False])
    pieces = [
        causal_conv_transpose1d(piece, weight, bias, pre="elu", overlap=overlap, active=active, **options)
        for piece in x.split([1, 4, 2, 5], dim=-1)
    ]
    assert relative_error(torch.cat(pieces, dim=-1)[:2], whole[:2]) < 1e-6
    assert (overlap[2] == 7.0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    x, weight, bias, options, tail = case(shape, 3, batch=1)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: causal_conv_transpose1d(*a, trim=(0, tail), **options), inputs)
