"""causal_conv1d, each implementation, against PyTorch's own convolution in fp64, whole and in chunks."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference.causal_conv1d import causal_conv1d as reference
from fastmimi.reference.causal_conv1d import ieee_convolutions, pad1d

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
def test_whole(op, shape, length, pre, post):
    x, weight, bias, options, left = case(shape, length)
    right = -length % options["stride"]
    activations = {"none": lambda t: t, "elu": F.elu, "silu": F.silu}
    padded = F.pad(activations[pre](x.double()), (left, right))
    truth = F.conv1d(padded, weight.double(), bias.double(), **options)
    residual = noise(*truth.shape, seed=4)
    truth = activations[post](truth + residual.double())
    mine = op(x, weight, bias, pad=(left, right), pre=pre, post=post, residual=residual, **options)
    assert mine.shape[-1] == -(-length // options["stride"])
    assert relative_error(mine, truth) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_chunks_equal_the_whole_and_masked_rows_stay(op, shape, mode):
    x, weight, bias, options, left = case(shape, 48)
    whole = op(x, weight, bias, pad=(left, 0), pad_mode=mode, pre="elu", **options)
    history = torch.full((3, left, x.shape[1]), float("nan"))  # the first call must replace it
    if mode == "constant":
        history.zero_()
    active = torch.tensor([True, True, False])
    frozen, outputs = history[2].clone(), []
    for i, chunk in enumerate(x.split([4, 12, 8, 24], dim=-1)):
        first = torch.full((3,), i == 0)
        outputs.append(
            op(chunk, weight, bias, pad=(left, 0), pad_mode=mode, pre="elu", history=history, first=first,
                          active=active, **options)
        )  # fmt: skip
    assert relative_error(torch.cat(outputs, dim=-1)[:2], whole[:2]) < 1e-6
    assert torch.equal(history[2], frozen) or bool(history[2].isnan().all() and frozen.isnan().all())
    assert torch.equal(history[:2], x[:2, :, 48 - left :].mT)


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_reflect_padding_longer_than_the_input(op, length):
    """Zeros are appended until there are enough samples to mirror, as in transformers."""
    x = noise(1, 2, length).bfloat16().float()  # so that the products of any kind of arithmetic are exact
    weight = torch.eye(2)[:, :, None]
    padded = op(x, weight, pad=(4, 0), pad_mode="reflect")
    enough = F.pad(x, (0, max(0, 5 - length)))
    assert torch.equal(padded[..., :4], enough[..., 1:5].flip(-1))
    assert torch.equal(padded[..., 4:], x)


@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
@pytest.mark.parametrize("length", [1, 2, 6, 40])
def test_padding_on_both_sides(op, mode, length):
    x, weight = noise(2, 3, length), noise(4, 3, 8)
    padded = [f(x, weight, pad=(4, 5), pad_mode=mode) for f in (op, reference)]
    assert relative_error(*padded) < 1e-6


def test_non_contiguous_input(op):
    x, weight, bias, options, left = case(SHAPES[2], 20)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(op(strided, weight, bias, pad=(left, 0), **options),
                       op(x, weight, bias, pad=(left, 0), **options))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("c_in, c_out, kernel, stride, dilation, post", [
    (64, 32, 3, 1, 1, "none"), (64, 128, 8, 4, 1, "none"), (512, 1024, 7, 1, 1, "none"), (64, 1, 3, 1, 1, "none"),
    (896, 896, 3, 1, 4, "silu"), (896, 896, 3, 8, 1, "none"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_models_shapes(op, c_in, c_out, kernel, stride, dilation, post, dtype):
    x, weight = noise(1, c_in, 72, seed=1).to(dtype), noise(c_out, c_in, kernel, seed=2, scale=0.1).to(dtype)
    bias = noise(c_out, seed=3).to(dtype)
    options = {
        "stride": stride,
        "dilation": dilation,
        "pad": (max(kernel - stride, 0) + (kernel - 1) * (dilation - 1), 0),
        "post": post,
    }
    assert_as_exact(op, reference, (x, weight, bias), longest=c_in * kernel, pre="elu", **options)


def test_elu_near_zero_keeps_its_relative_accuracy(op):
    """exp(x) - 1 would lose it; quiet audio has such values."""
    x = -torch.logspace(-7, 0, 200)[None, None]
    y = op(x, torch.ones(1, 1, 1), pre="elu")
    truth = torch.expm1(x.double())
    assert ((y - truth) / truth).abs().max() < 1e-6


def test_nan_propagates(op):
    x = noise(1, 4, 20)
    x[0, 0, 10] = float("nan")
    y = op(x, noise(4, 4, 3), pad=(2, 0), pre="elu", post="elu")
    assert y[..., 10:13].isnan().all() and not y[..., :10].isnan().any()


@pytest.mark.parametrize("batch, sizes", [(40, [1, 1, 2]), (5, [70, 1, 30])])
def test_many_streams_at_once(op, batch, sizes):
    """Rows share a tile or take several; each has its own history, and a new row replicates its own first sample."""
    x, weight = noise(batch, 20, sum(sizes), seed=1), noise(30, 20, 3, seed=2)
    active = torch.arange(batch) % 3 != 1
    history, kept = noise(batch, 2, 20, seed=3), noise(batch, 2, 20, seed=3)
    first, outputs, expected = torch.arange(batch) % 2 == 0, [], []
    for chunk in x.split(sizes, dim=-1):
        options = {"pad": (2, 0), "pad_mode": "replicate", "first": first, "active": active}
        outputs.append(op(chunk, weight, history=history, **options))
        expected.append(reference(chunk, weight, history=kept, **options))
        assert torch.equal(history, kept)
        first = first & False
    assert relative_error(torch.cat(outputs, dim=-1), torch.cat(expected, dim=-1)) < 1e-6


@pytest.mark.parametrize("channels, length", [(8, 1), (8, 2), (8, 3), (1, 1), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_of_any_length(op, channels, length, dtype):
    """With one time step or one channel, strides do not tell channels-first from channels-last."""
    x, weight, residual = noise(2, 8, length, seed=1), noise(channels, 8, 3, seed=2), noise(2, channels, length, seed=3)
    x, weight, residual = (t.to(dtype) for t in (x, weight, residual))
    strided = residual.repeat_interleave(2, dim=2)[..., ::2]
    for r in (residual, residual.transpose(1, 2).contiguous().transpose(1, 2), strided):
        calls = (lambda x, w, r, f=f: f(x, w, pad=(2, 0), residual=r) for f in (op, reference))
        assert_as_exact(*calls, (x, weight, r), longest=8 * 3)


@pytest.mark.parametrize("op", ["cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)], indirect=True)
@pytest.mark.parametrize("channels", [1, 4, 8, 12, 32])
@pytest.mark.parametrize("kernel, stride", [(8, 4), (16, 8)])
def test_strided_convolutions_of_few_channels_in_bf16(op, channels, kernel, stride):
    """Compared with fp64 only: with AMX, PyTorch's own bf16 convolution is wrong by as much as the peak."""
    x, weight = noise(2, channels, 67), noise(8, channels, kernel, seed=1, scale=(channels * kernel) ** -0.5)
    x, weight = x.bfloat16(), weight.bfloat16()
    truth = reference(x.double(), weight.double(), stride=stride, pad=(kernel - stride, 0))
    assert relative_error(op(x, weight, stride=stride, pad=(kernel - stride, 0)), truth) < 0.01


def test_edited_weights_are_used(op):
    x, weight = noise(1, 4, 9), noise(5, 4, 3)
    op(x, weight)
    weight.mul_(2)
    assert relative_error(op(x, weight), reference(x, weight)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_the_reference(op, shape):
    x, weight, bias, options, left = case(shape, 16)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    results = []
    for f in (op, reference):
        y = f(*inputs, pad=(left, 0), pre="elu", **options)
        results.append(torch.autograd.grad(y, inputs, noise(*y.shape, seed=5)))
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_gradients_of_the_reference(shape):
    x, weight, bias, options, left = case(shape, 8, batch=1)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, pad=(left, 0), pre="elu", **options), inputs)


@pytest.mark.parametrize("shape", [*SHAPES, (16, 8, 8, 4, 1, 1), (4, 8, 16, 8, 1, 1), (32, 8, 8, 4, 1, 1)])
@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
@pytest.mark.parametrize("onednn", [True, False])
def test_gradients_of_the_reference_in_mixed_precision(shape, mode, onednn):
    """In bf16 on a CPU it computes channels-last, and keeps tensors so."""
    for length in (24, 67):
        x, weight, bias, options, left = case(shape, length)
        results = []
        for bf16, dtype in ((True, torch.float32), (False, torch.float64)):
            inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.backends.mkldnn.flags(enabled=onednn):
                y = reference(*inputs, pad=(left, 1), pad_mode=mode, pre="elu", **options)
                grad = noise(*y.shape, seed=5).bfloat16().to(y.dtype)
                results.append([y, *torch.autograd.grad(y, inputs, grad)])
        for mine, truth in zip(*results, strict=True):
            assert mine.shape == truth.shape and relative_error(mine.double(), truth) < 1e-2
        y = results[0][0]
        few = options["stride"] > 1 and options["groups"] == 1 and shape[0] < 32  # which are computed in fp32
        assert y.dtype == torch.bfloat16 and (few or y.stride(1) == 1 or y.shape[1] == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_in_bf16_in_chunks(shape):
    x, weight, bias, options, left = case(shape, 48)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    history, active, outputs = torch.zeros(3, left, x.shape[1], dtype=x.dtype), torch.ones(3, dtype=torch.bool), []
    for i, chunk in enumerate(x.split([4, 12, 8, 24], dim=-1)):
        state = {"history": history, "first": torch.full((3,), i == 0), "active": active}
        outputs.append(reference(chunk, weight, bias, pad=(left, 0), pre="elu", **options, **state))
    whole = reference(x, weight, bias, pad=(left, 0), pre="elu", **options)
    assert relative_error(torch.cat(outputs, dim=-1), whole) < 1e-2
    assert reference(x[:0], weight, bias, pad=(left, 0), **options).shape == (0, *whole.shape[1:])


def test_padding_in_bf16_keeps_the_layout():
    x = noise(2, 9, 5).bfloat16().transpose(1, 2)
    padded = pad1d(x, (2, 1), "constant")
    assert torch.equal(padded, F.pad(x, (2, 1))) and padded.stride(1) == 1


def test_the_reference_in_bf16_under_vmap():
    x, weight = noise(3, 2, 4, 9).bfloat16(), noise(5, 4, 3).bfloat16()
    mapped = torch.vmap(lambda x: reference(x, weight, pad=(2, 0)))(x)
    assert relative_error(mapped.flatten(0, 1), reference(x.flatten(0, 1), weight, pad=(2, 0))) < 1e-2


class OnCuda:
    """Stands in for an fp32 tensor on a GPU."""

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
