"""Whole models through the kernels of a backend, against the reference: offline, ragged, streaming, half precision."""

import pytest
import torch

from fastmimi.devtools.testing import (
    as_function,
    assert_as_exact,
    assert_same_codes,
    check_interpreter,
    chunks,
    longest_sum,
    noise,
    relative_error,
    short_tiles,
    small_model,
)
from fastmimi.errors import InputError
from fastmimi.runtime import dispatch

SHORT = {"upsampling_ratios": [4, 3, 2], "frame_rate": 500}  # frames of 48 samples


@pytest.fixture(params=["onednn", pytest.param("triton", marks=pytest.mark.kernels)])
def pair(request):
    """A function that makes a model twice: with the backend's kernels and with the reference, on one device."""

    def make(name="small", dtype=torch.float32, **changes):
        models = [small_model(name, **changes).to(device_of(request.param), dtype) for _ in range(2)]
        models[0].impl, models[1].impl = request.param, "reference"
        return models

    make.backend = request.param
    return make


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", [
    "small", "residual_layers", "shortcut", "semantic", "attention", "rope", "unprojected", "stereo", "replicate",
    "reflect", "not_causal", "not_causal_reflect", "trim",
])  # fmt: skip
@torch.no_grad()
def test_offline(pair, name):
    mine, theirs = pair(name, **SHORT)
    for samples in (1, 1357):
        audio = noise(2, mine.config.audio_channels, samples).to(mine.device)
        assert_same_codes(mine.encode(audio), theirs.encode(audio), theirs.encode_to_latent(audio), theirs)
        codes = theirs.encode(audio)
        assert relative_error(mine.decode(codes), theirs.decode(codes)) < 1e-5


@torch.no_grad()
def test_ragged(pair):
    mine, theirs = pair(**SHORT)
    audio, mask = noise(3, 1, 500).to(mine.device), torch.ones(3, 500, dtype=torch.bool, device=mine.device)
    mask[1, 300:] = mask[2, :77] = False
    codes = theirs.encode(audio, padding_mask=mask)
    assert torch.equal(mine.encode(audio, padding_mask=mask), codes)
    frames = theirs.frame_mask(mask)
    assert relative_error(*(m.decode(codes, padding_mask=frames) for m in (mine, theirs))) < 1e-5


@pytest.mark.parametrize("name", ["small", "replicate", "attention"])
@torch.no_grad()
def test_streams(pair, name):
    """Chunks of any length equal one call over the whole; a masked stream does not change."""
    mine, theirs = pair(name, **SHORT)
    audio = noise(3, 1, 1100).to(mine.device)
    codes, state = theirs.encode(audio), mine.new_state(3)
    streamed = [mine.encode(chunk, state=state) for chunk in audio.split(chunks(1100, 1, 500), dim=-1)]
    assert torch.equal(torch.cat([*streamed, mine.flush(state)], dim=-1), codes)
    state.exec_mask[1] = False
    before = {k: v[1].clone() for k, v in state.decode.buffers.items()}
    sound = [mine.decode(chunk, state=state) for chunk in codes.split(chunks(codes.shape[-1], 2, 9), dim=-1)]
    assert relative_error(torch.cat(sound, dim=-1)[::2], theirs.decode(codes)[::2]) < 1e-5
    assert all(torch.equal(state.decode.buffers[k][1], v) for k, v in before.items())


@torch.no_grad()
def test_tiles_of_long_audio(pair):
    mine, theirs = pair(**SHORT)
    audio = noise(2, 1, 3000).to(mine.device)
    codes = theirs.encode(audio)
    with short_tiles(mine, 2, 15) as tiled:
        assert torch.equal(mine.encode(audio), codes)
    assert tiled == [3000]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(pair, dtype):
    """Compared with the reference in fp64 on the same weights, within the bound of `assert_as_exact`."""
    if pair.backend == "onednn" and (why := dispatch.why_not("onednn", "causal_conv1d", dispatch.Target("cpu", dtype))):
        pytest.skip(why)
    # With fewer filters, oneDNN's strided bf16 convolutions of 4 to 24 channels are wrong on processors with AMX.
    mine, theirs = pair(dtype=dtype, **SHORT, num_filters=32)
    audio = noise(2, 1, 1000).to(mine.device, dtype)
    codes = theirs.encode(audio)
    for method, x in (("encode_to_latent", audio), ("decode", codes)):
        call, reference = getattr(mine, method), as_function(theirs, method)
        operands = (x, *theirs.parameters())
        assert_as_exact(lambda x, *_, f=call: f(x), reference, operands, longest=longest_sum(theirs))
    assert mine.encode(audio).shape == codes.shape


def test_a_numpy_that_breaks_the_interpreter_is_refused():
    with pytest.raises(InputError, match=r"Triton 3\.6\.0 fails .* NumPy 2\.4\.6 is installed: pip install 'numpy<2"):
        check_interpreter("3.6.0", "2.4.6")
    for versions in (("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.9.0+git1", "2.5.5"), ("3.10.0", "2.10.0")):
        check_interpreter(*versions)
