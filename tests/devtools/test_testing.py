"""Tests of `assert_as_exact`: it accepts fp32 sums in any order, and refuses missing terms and lower precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastmimi.devtools.testing import (
    Errors,
    as_function,
    assert_as_exact,
    errors,
    longest_sum,
    noise,
    relative_error,
    small_model,
)
from fastmimi.reference.causal_conv1d import causal_conv1d
from fastmimi.reference.causal_conv_transpose1d import causal_conv_transpose1d
from fastmimi.reference.resblock import resblock
from fastmimi.reference.transformer_layer import transformer_layer
from fastmimi.reference.window_attention import window_attention


class Products(TorchFunctionMode):
    """Replaces the matrix products in PyTorch's operations by multiply(index, a [..., M, N], b [..., N, P])."""

    def __init__(self, multiply):
        super().__init__()
        self.multiply, self.count = multiply, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return {
            F.conv1d: self.conv1d,
            F.conv2d: self.conv2d,
            F.conv_transpose1d: self.conv_transpose1d,
            F.conv_transpose2d: self.conv_transpose2d,
            F.linear: self.linear,
            F.scaled_dot_product_attention: self.attention,
        }.get(func, func)(*args, **(kwargs or {}))

    def product(self, a, b):
        self.count += 1
        return self.multiply(self.count - 1, a, b)

    def conv1d(self, x, weight, bias, stride, dilation, groups):
        columns = F.unfold(x[:, :, None], (1, weight.shape[2]), dilation=(1, dilation), stride=(1, stride))
        assert groups == 1
        y = self.product(weight.flatten(1), columns)
        return y if bias is None else y + bias[:, None]

    def conv_transpose1d(self, x, weight, bias, stride, groups, output_padding):
        if groups != 1:  # depthwise: sums of two terms
            return F.conv_transpose1d(x, weight, bias, stride, 0, output_padding, groups)
        assert output_padding == 0
        columns, kernel = self.product(weight.flatten(1).t(), x), weight.shape[2]
        full = (1, (x.shape[2] - 1) * stride + kernel)
        y = F.fold(columns, full, (1, kernel), stride=(1, stride))[:, :, 0]
        return y if bias is None else y + bias[:, None]

    def conv2d(self, x, weight, bias, stride, padding, dilation, groups):
        """Of images [B, C, 1, T], as the reference calls it in bf16."""
        assert padding == 0
        return self.conv1d(x.squeeze(2), weight.squeeze(2), bias, stride[1], dilation[1], groups).unsqueeze(2)

    def conv_transpose2d(self, x, weight, bias, stride, padding, output_padding, groups):
        assert padding == 0
        x, weight = x.squeeze(2), weight.squeeze(2)
        return self.conv_transpose1d(x, weight, bias, stride[1], groups, output_padding[1]).unsqueeze(2)

    def linear(self, x, weight, bias=None):
        y = self.product(x, weight.t())
        return y if bias is None else y + bias

    def attention(self, q, k, v, visible, dropout):
        scores = self.product(q, k.mT) / q.shape[-1] ** 0.5
        return self.product(scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def terms(a, b):
    return (a[..., i, None] * b[..., i, None, :] for i in range(a.shape[-1]))


def sequential(_, a, b):
    return sum(terms(a, b))


def backwards(_, a, b):
    return sum(terms(a.flip(-1), b.flip(-2)))


def blocked(_, a, b):
    return sum(x @ y for x, y in zip(a.split(16, dim=-1), b.split(16, dim=-2), strict=True))


def pairwise(_, a, b):
    half = a.shape[-1] // 2
    if half == 0:
        return a @ b
    return pairwise(_, a[..., :half], b[..., :half, :]) + pairwise(_, a[..., half:], b[..., half:, :])


def in_fp64(_, a, b):
    return (a.double() @ b.double()).to(a.dtype)


def without_a_term(a, b):
    return a[..., 1:] @ b[..., 1:, :]


def bfloat16(a, b):
    return a.bfloat16().float() @ b


def tf32(a, b):
    """One operand rounded to nearest with 10 bits of mantissa."""
    return ((a.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) @ b


def sums_in_bfloat16(a, b):
    return sum(terms(a, b))


def frequencies(dim):
    return 1.0 / (10_000.0 ** (torch.arange(0, dim, 2) / dim))


def convolution(c_in, c_out, kernel, stride=1, post="none"):
    operands = [noise(1, c_in, 24, seed=1), noise(c_out, c_in, kernel, seed=2, scale=0.1), noise(c_out, seed=3)]
    options = {"stride": stride, "pad": (kernel - stride, 0), "pre": "elu", "post": post, "longest": c_in * kernel}
    return causal_conv1d, operands, options, {"pad": (kernel - stride - 1, 1)}


def transposed(c_in, c_out, stride):
    operands = [noise(1, c_in, 9, seed=1), noise(c_in, c_out, 2 * stride, seed=2, scale=0.1), noise(c_out, seed=3)]
    options = {"stride": stride, "trim": (0, stride), "pre": "elu", "longest": 2 * c_in}
    return causal_conv_transpose1d, operands, options, {"trim": (1, stride - 1)}


def unit(channels):
    half = channels // 2
    shapes = [(1, channels, 20), (half, channels, 3), (half,), (channels, half, 1), (channels,)]
    operands = [noise(*shape, seed=i, scale=0.3 if i == 0 else 0.1) for i, shape in enumerate(shapes)]
    return resblock, operands, {"pad": (2, 0), "longest": 3 * channels}, {"pad": (1, 1)}


def attention(dim, length, window):
    operands = [noise(1, 2, length, dim, seed=i, scale=1.0) for i in range(3)] + [frequencies(dim)]
    options = {"window": window, "longest": max(dim, min(length, window)), "fixed": (3,)}
    return window_attention, operands, options, {"window": window - 1}


def layer(width, hidden, length=12):
    shapes = [(width,)] * 2 + [(width, width)] * 4 + [(width,)] * 3 + [(hidden, width), (width, hidden), (width,)]
    weights = [noise(*shape, seed=i, scale=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
               for i, shape in enumerate(shapes)]  # fmt: skip
    options = {"window": 8, "eps": 1e-5, "longest": hidden, "fixed": (13,)}
    operands = [noise(1, length, width, seed=30, scale=1.0), *weights, frequencies(16)]
    return transformer_layer, operands, options, {"window": 7}


def codec(method, *shape):
    model = small_model()
    model.impl = "reference"
    operands = [noise(*shape, seed=3), *model.parameters()]
    return as_function(model, method), operands, {"longest": longest_sum(model)}


CASES = {
    "conv of 1 channel": convolution(1, 8, 7),
    "conv of 64 channels": convolution(64, 32, 3, post="silu"),
    "conv of 512 channels": convolution(512, 40, 7, 2),
    "transposed conv of 8 channels": transposed(8, 4, 3),
    "transposed conv of 512 channels": transposed(512, 20, 4),
    "unit of 16 channels": unit(16),
    "unit of 256 channels": unit(256),
    "attention of 16 dimensions": attention(16, 20, 5),
    "attention of 64 dimensions": attention(64, 150, 100),
    "layer of 32 channels": layer(32, 50),
    "layer of 256 channels": layer(256, 1024),
}
CODECS = {
    "encoder": codec("encode_to_latent", 1, 1, 2 * 1920),
    "decoder": codec("decode_latent", 1, 32, 2),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def computed_with(multiply, reference):
    def op(*operands, **options):
        with Products(multiply):
            return reference(*operands, **options)

    return op


def number_of_products(reference, operands, options):
    options = {name: value for name, value in options.items() if name not in ("longest", "fixed")}
    with Products(in_fp64) as products:
        reference(*operands, **options)
    return products.count


@pytest.mark.parametrize("multiply", [sequential, backwards, blocked, pairwise, in_fp64])
@pytest.mark.parametrize("name", [*CASES, *CODECS])
def test_fp32_sums_in_any_order_are_within_the_bound(name, multiply):
    """Independently of the error of PyTorch's kernels on this processor."""
    reference, operands, options, *_ = (CASES | CODECS)[name]
    found = errors(computed_with(multiply, reference), reference, operands, **options)
    assert found.mine <= found.bound + found.eps, found


@pytest.mark.parametrize("fault", [without_a_term, bfloat16, tf32])
def test_one_faulty_product_is_refused(case, fault):
    """One product of the op is faulty and the others are correct, for each product in turn."""
    reference, operands, options, _ = case
    for faulty in range(number_of_products(reference, operands, options)):

        def multiply(number, a, b, faulty=faulty):
            return fault(a, b) if number == faulty else a @ b

        with pytest.raises(AssertionError, match="of the peak"):
            assert_as_exact(computed_with(multiply, reference), reference, operands, **options)


@pytest.mark.parametrize("fault", [without_a_term, bfloat16, tf32])
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_with_faulty_products_is_refused(name, fault):
    """All products at once: LayerScale can hide the error of a single layer, which the tests of its op cover."""
    reference, operands, options = CODECS[name]
    with pytest.raises(AssertionError, match="of the peak"):
        assert_as_exact(computed_with(lambda _, a, b: fault(a, b), reference), reference, operands, **options)


def test_a_wrong_pad_trim_or_window_is_refused(case):
    reference, operands, options, wrong = case

    def op(*operands, **options):
        return reference(*operands, **(options | wrong))

    with pytest.raises(AssertionError, match="of the peak"):
        assert_as_exact(op, reference, operands, **options)


@pytest.mark.parametrize("name", [name for name in CASES if "512" in name or "256" in name])
def test_sums_in_half_precision_are_refused(name):
    reference, operands, options, _ = CASES[name]
    operands = [t if i in options.get("fixed", ()) else t.bfloat16() for i, t in enumerate(operands)]
    assert_as_exact(
        computed_with(lambda _, a, b: (a.float() @ b.float()).bfloat16(), reference), reference, operands, **options
    )
    with pytest.raises(AssertionError, match="of the peak"):
        assert_as_exact(
            computed_with(lambda _, a, b: sums_in_bfloat16(a, b), reference), reference, operands, **options
        )


def test_an_error_as_large_as_pytorchs_is_refused():
    """An op that agrees with a wrong result of PyTorch is refused: both are off by the whole peak."""
    found = Errors(mine=1.0, plain=1.0, bound=1e-6, eps=1e-7)
    with pytest.raises(AssertionError, match="of the peak"):
        found.check()
    Errors(mine=1.9e-6, plain=1e-6, bound=1e-6, eps=1e-7).check()


@pytest.mark.kernels
def test_the_interpreter_multiplies_as_tensor_cores_do():
    """In TF32 with 11 significant bits; in three TF32 products as accurately as in fp32; infinities stay."""
    import triton
    import triton.language as tl

    @triton.jit
    def product(p_a, p_b, p_c, PRECISION: tl.constexpr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(p_c + at, tl.dot(tl.load(p_a + at), tl.load(p_b + at), input_precision=PRECISION))

    a, b, errors = noise(16, 16), noise(16, 16, seed=1), {}
    for precision in ("ieee", "tf32", "tf32x3"):
        c = torch.empty(16, 16)
        product[(1,)](a, b, c, precision)
        errors[precision] = relative_error(c, a.double() @ b.double())
    assert errors["ieee"] < 1e-6 and errors["tf32x3"] < 1e-6 and 1e-4 < errors["tf32"] < 1e-3
    a[3, 5] = torch.inf
    product[(1,)](a, b.abs(), c, "tf32x3")
    assert (c[3] == torch.inf).all() and c[:3].isfinite().all()
