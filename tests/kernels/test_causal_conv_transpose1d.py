"""causal_conv_transpose1d, each implementation, against an explicit overlap-add in fp64, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference.causal_conv_transpose1d import causal_conv_transpose1d as reference

SHAPES = [  # in, out, kernel, stride, groups
    (8, 4, 16, 8, 1), (6, 3, 10, 5, 1), (6, 6, 4, 2, 6), (4, 2, 3, 1, 1), (4, 1, 6, 3, 1), (6, 4, 7, 3, 2),
    (3, 3, 7, 2, 3), (4, 5, 3, 8, 1), (6, 4, 3, 5, 2), (6, 6, 3, 4, 6),  # strides longer than the kernel
]  # fmt: skip


def case(shape, length, batch=3):
    c_in, c_out, kernel, stride, groups = shape
    x, weight = noise(batch, c_in, length, seed=1), noise(c_in, c_out // groups, kernel, seed=2)
    return x, weight, noise(c_out, seed=3), {"stride": stride, "groups": groups}, kernel - stride


def empty_history(x, weight, stride):
    """Zeros [B, taps - 1, C]: the inputs before the first one that contribute to its outputs."""
    return x.new_zeros(x.shape[0], -(-weight.shape[2] // stride) - 1, x.shape[1])


def overlap_add(x, weight, bias, stride, groups):
    """The sum over t and k of weight[:, :, k] applied to x[:, :, t], at time t * stride + k; not trimmed."""
    x, weight = x.double(), weight.double()
    kernel, length = weight.shape[2], x.shape[2]
    y = torch.zeros(x.shape[0], bias.shape[0], (length - 1) * stride + max(kernel, stride + 1), dtype=torch.double)
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
def test_whole(op, shape, length, left):
    x, weight, bias, options, tail = case(shape, length)
    truth = overlap_add(F.elu(x.double()), weight, bias, **options)
    mine = op(x, weight, bias, trim=(left, tail - left), pre="elu", **options)
    assert mine.shape[-1] == length * options["stride"]
    assert relative_error(mine, truth[..., left : left + mine.shape[-1]]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_whole_and_masked_rows_stay(op, shape):
    x, weight, bias, options, tail = case(shape, 12)
    whole = op(x, weight, bias, trim=(0, tail), pre="elu", **options)
    history = empty_history(x, weight, options["stride"])
    history[2] = 7.0
    active, first = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.bool)
    outputs = [
        op(chunk, weight, bias, pre="elu", history=history, first=first, active=active, **options)
        for chunk in x.split([1, 4, 2, 5], dim=-1)
    ]
    assert relative_error(torch.cat(outputs, dim=-1)[:2], whole[:2]) < 1e-6
    assert (history[2] == 7.0).all()
    assert torch.equal(history[:2], x[:2, :, 12 - history.shape[1] :].mT)


@pytest.mark.slow
@pytest.mark.parametrize("c_in, c_out, stride, groups", [
    (128, 64, 4, 1), (256, 128, 5, 1), (512, 256, 6, 1), (512, 512, 2, 512), (896, 896, 8, 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 70])
def test_the_models_shapes(op, c_in, c_out, stride, groups, dtype, length):
    kernel = 3 if c_in == 896 else 2 * stride
    x, weight = noise(1, c_in, length, seed=1), noise(c_in, c_out // groups, kernel, seed=2, scale=0.1)
    x, weight, bias = (t.to(dtype) for t in (x, weight, noise(c_out, seed=3)))
    longest = c_in // groups * -(-kernel // stride)  # terms of the sum of one output
    options = {"stride": stride, "groups": groups, "pre": "elu"}
    trim = (0, kernel - stride)
    assert_as_exact(op, reference, (x, weight, bias), longest=longest, trim=trim, **options)

    def streaming(f):
        """The op on a chunk of a stream, whose history it replaces by the last inputs."""

        def call(x, weight, bias, history):
            kept, flags = history.clone(), {"first": torch.tensor([False]), "active": torch.tensor([True])}
            y = f(x, weight, bias, history=kept, **flags, **options)
            assert torch.equal(kept, torch.cat([history, x.mT], dim=1)[:, x.shape[2] :])
            return y

        return call

    history = noise(*empty_history(x, weight, stride).shape, seed=4).to(dtype)
    assert_as_exact(streaming(op), streaming(reference), (x, weight, bias, history), longest=longest)


def test_empty_batch(op):
    assert op(noise(0, 4, 3), noise(4, 2, 6), stride=3, trim=(0, 3)).shape == (0, 2, 9)


@pytest.mark.parametrize("batch, sizes", [(40, [1, 1, 2]), (5, [130, 1])])
@pytest.mark.parametrize("groups", [1, 20])
def test_many_streams_at_once(op, batch, sizes, groups):
    x, weight = noise(batch, 20, sum(sizes), seed=1), noise(20, 20 // groups, 6, seed=2)
    active = torch.arange(batch) % 3 != 1
    history, kept = noise(batch, 2, 20, seed=3), noise(batch, 2, 20, seed=3)
    for chunk in x.split(sizes, dim=-1):
        options = {"stride": 2, "groups": groups, "active": active, "first": active & False}
        mine = op(chunk, weight, history=history, **options)
        assert relative_error(mine, reference(chunk, weight, history=kept, **options)) < 1e-6
        assert torch.equal(history, kept)


def test_non_contiguous_input(op):
    x, weight, bias, options, _ = case(SHAPES[0], 9)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(op(strided, weight, bias, **options), op(x, weight, bias, **options)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_the_reference(op, shape):
    x, weight, bias, options, tail = case(shape, 5)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    results = []
    for f in (op, reference):
        y = f(*inputs, trim=(0, tail), pre="elu", **options)
        results.append(torch.autograd.grad(y, inputs, noise(*y.shape, seed=5)))
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_reference(shape):
    x, weight, bias, options, tail = case(shape, 3, batch=1)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, trim=(0, tail), **options), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("onednn", [True, False])
def test_gradients_of_the_reference_in_mixed_precision(shape, onednn):
    """In bf16 on a CPU it computes channels-last, and keeps tensors so."""
    x, weight, bias, options, tail = case(shape, 12)
    results = []
    for bf16, dtype in ((True, torch.float32), (False, torch.float64)):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.backends.mkldnn.flags(enabled=onednn):
            y = reference(*inputs, trim=(0, tail), pre="elu", **options)
            results.append([y, *torch.autograd.grad(y, inputs, noise(*y.shape, seed=5).bfloat16().to(y.dtype))])
    for mine, truth in zip(*results, strict=True):
        assert mine.shape == truth.shape and relative_error(mine.double(), truth) < 1e-2
    y = results[0][0]
    assert y.dtype == torch.bfloat16 and (y.stride(1) == 1 or y.shape[1] == 1)
