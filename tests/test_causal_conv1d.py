"""The reference of causal_conv1d against PyTorch's own convolution in fp64, whole and in chunks."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from fastmimi.reference.causal_conv1d import causal_conv1d, ieee_convolutions
from fastmimi.testing import noise, relative_error

SHAPES = [  # channels in and out, kernel, stride, dilation, groups
    (1, 8, 7, 1, 1, 1),
    (8, 4, 3, 1, 1, 1),
    (8, 8, 3, 1, 4, 1),
    (4, 6, 8, 4, 1, 1),
    (6, 6, 4, 2, 1, 6),
    (5, 1, 1, 1, 1, 1),
]


def case(shape, length, batch=3):
    c_in, c_out, kernel, stride, dilation, groups = shape
    x = noise(batch, c_in, length, seed=1)
    weight, bias = noise(c_out, c_in // groups, kernel, seed=2), noise(c_out, seed=3)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    return x, weight, bias, options, (kernel - 1) * dilation + 1 - stride


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize("pre, post", [("none", "none"), ("elu", "none"), ("silu", "elu")])
def test_whole(shape, length, pre, post):
    x, weight, bias, options, left = case(shape, length)
    right = -length % options["stride"]
    activations = {"none": lambda t: t, "elu": F.elu, "silu": F.silu}
    padded = F.pad(activations[pre](x.double()), (left, right))
    truth = activations[post](F.conv1d(padded, weight.double(), bias.double(), **options))
    residual = noise(*truth.shape, seed=4)
    mine = causal_conv1d(x, weight, bias, pad=(left, right), pre=pre, post=post, residual=residual, **options)
    assert mine.shape[-1] == -(-length // options["stride"])
    assert relative_error(mine, truth + residual.double()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_chunks_equal_the_whole_and_masked_rows_stay(shape, mode):
    x, weight, bias, options, left = case(shape, 48)
    whole = causal_conv1d(x, weight, bias, pad=(left, 0), pad_mode=mode, pre="elu", **options)
    history = torch.full((3, x.shape[1], left), float("nan"))  # to be replaced on the first call, or zero
    if mode == "constant":
        history.zero_()
    active = torch.tensor([True, True, False])
    frozen, pieces = history[2].clone(), []
    for i, piece in enumerate(x.split([4, 12, 8, 24], dim=-1)):
        first = torch.full((3,), i == 0)
        pieces.append(
            causal_conv1d(piece, weight, bias, pad=(left, 0), pad_mode=mode, pre="elu", history=history, first=first,
                          active=active, **options)
        )  # fmt: skip
    assert relative_error(torch.cat(pieces, dim=-1)[:2], whole[:2]) < 1e-6
    assert torch.equal(history[2], frozen) or bool(history[2].isnan().all() and frozen.isnan().all())
    assert torch.equal(history[:2], x[:2, :, 48 - left :] if left else history[:2])


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_reflect_on_less_than_it_mirrors(length):
    """Zeros are put on the right until there is enough to mirror, as in the peers."""
    x = noise(1, 2, length)
    weight = torch.eye(2)[:, :, None]
    padded = causal_conv1d(x, weight, pad=(4, 0), pad_mode="reflect")
    enough = F.pad(x, (0, max(0, 5 - length)))
    assert torch.equal(padded[..., :4], enough[..., 1:5].flip(-1))
    assert torch.equal(padded[..., 4:], x)


def test_not_contiguous_input():
    x, weight, bias, options, left = case(SHAPES[2], 20)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(causal_conv1d(strided, weight, bias, pad=(left, 0), **options),
                       causal_conv1d(x, weight, bias, pad=(left, 0), **options))  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_gradients(shape):
    x, weight, bias, options, left = case(shape, 8, batch=1)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, pad=(left, 0), pre="elu", **options), inputs)


class OnCuda:
    """Says it is an fp32 tensor on a GPU."""

    device, dtype = torch.device("cuda"), torch.float32


def test_fp32_on_a_gpu_is_not_tf32():
    flags = torch.backends.cudnn
    name, ieee = ("allow_tf32", False) if not hasattr(flags, "conv") else ("fp32_precision", "ieee")
    flags = getattr(flags, "conv", flags)
    before = getattr(flags, name)
    with suppress(KeyError), ieee_convolutions(OnCuda()):
        assert getattr(flags, name) == ieee
        raise KeyError
    assert getattr(flags, name) == before != ieee
