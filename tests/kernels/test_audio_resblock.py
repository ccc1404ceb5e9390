"""audio_resblock, each implementation, against PyTorch's modules in fp64, and against the two ops it stands for."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference.audio_resblock import audio_resblock as reference
from fastmimi.runtime.dispatch import implementation


def case(after, channels=8, *, audio_channels=1, taps=5, batch=2, length=31, dtype=torch.float32):
    """The tensors of a call."""
    half, around = channels // 2, (channels, audio_channels) if after else (audio_channels, channels)
    shapes = [
        (batch, around[0], length), (half, channels, 3), (half,), (channels, half, 1), (channels,),
        (around[1], around[0], taps), (around[1],),
    ]  # fmt: skip
    return [noise(*shape, seed=i, scale=0.3).to(dtype) for i, shape in enumerate(shapes)]


def in_fp64(tensors, after, dilation, post):
    x, w1, b1, w2, b2, w, b = (t.double() for t in tensors)

    def audio(x):
        return F.conv1d(F.pad(x, (w.shape[2] - 1, 0)), w, b)

    x = x if after else audio(x)
    hidden = F.conv1d(F.pad(F.elu(x), (2 * dilation, 0)), w1, b1, dilation=dilation)
    x = x + F.conv1d(F.elu(hidden), w2, b2)
    x = F.elu(x) if post == "elu" else x
    return audio(x) if after else x


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("length", [1, 2, 31, 58, 59, 62, 63, 124, 131])  # a tile has 64 or 128 rows with those before
def test_whole(op, after, length):
    tensors = case(after, length=length)
    for dilation, post in ((1, "elu"), (3, "none")):
        found = op(*tensors, after=after, dilation=dilation, post=post)
        assert relative_error(found, in_fp64(tensors, after, dilation, post)) < 1e-6


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_models_shapes(op, after, dtype):
    tensors = case(after, 64, taps=3 if after else 7, length=150, dtype=dtype)
    tensors = [t / 3 if t.dim() == 3 and i else t for i, t in enumerate(tensors)]
    assert_as_exact(op, reference, tensors, longest=3 * 64, after=after, post="elu")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", [{"audio_channels": 2}, {"channels": 96}, {"taps": 18}, {"batch": 40, "length": 3}])
def test_other_shapes(op, after, changes):
    """More channels or taps than a tile holds, and many short rows."""
    tensors = case(after, **changes)
    assert relative_error(op(*tensors, after=after), in_fp64(tensors, after, 1, "none")) < 1e-6
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(op(*tensors, after=after), in_fp64(tensors, after, 1, "none")) < 1e-6


@pytest.mark.parametrize("after", [False, True])
def test_a_nan_reaches_what_depends_on_it_and_nothing_else(op, after):
    tensors = case(after, length=140)
    x = tensors[0]
    x[1, :, 60] = float("nan")
    found = op(*tensors, after=after).isnan().any(1)
    expected = torch.zeros_like(found)
    expected[1, 60 : 60 + 7] = True  # 5 taps and 3
    assert torch.equal(found, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("after", [False, True])
def test_it_equals_the_two_launches(after):
    """The unit's input and the sums over taps are rounded elsewhere, no more often."""
    op, unit, conv = (implementation(name, "triton") for name in ("audio_resblock", "resblock", "causal_conv1d"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [t.to(device) for t in case(after, 64, taps=7, length=150)]
    x, weights, audio = tensors[0], tensors[1:5], tensors[5:]
    if after:
        apart = conv(unit(x, *weights, pad=(2, 0), post="elu"), *audio, pad=(6, 0))
    else:
        apart = unit(conv(x, *audio, pad=(6, 0)), *weights, pad=(2, 0), post="elu")
    together = op(*tensors, after=after, post="elu")
    assert together.stride() == apart.stride()
    assert relative_error(together, apart) < 1e-6
