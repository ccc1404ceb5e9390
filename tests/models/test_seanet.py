"""SEANet: which layers are joined where a kernel computes two of them; their results are tested in tests/kernels."""

from unittest import mock

import pytest
import torch

from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.models.codec import Codec
from fastmimi.reference.audio_resblock import audio_resblock
from fastmimi.runtime import dispatch

SHORT = {"upsampling_ratios": [4, 3, 2], "frame_rate": 500}  # frames of 48 samples


@pytest.fixture
def joined(monkeypatch):
    """Whether the convolution is after the unit, for each call of `audio_resblock`, which there is a kernel for."""
    calls = []

    def kernel(*tensors, after, **options):
        calls.append(after)
        return audio_resblock(*tensors, after=after, **options)

    ops = dispatch.bind("cpu", torch.float32, "reference")._replace(audio_resblock=kernel)
    monkeypatch.setattr(Codec, "ops", ops)
    return calls


@pytest.mark.parametrize("name", ["small", "residual_layers", "stereo"])
@torch.no_grad()
def test_offline_the_audios_convolution_and_the_unit_beside_it_are_one(joined, name):
    model = small_model(name, **SHORT)
    audio = noise(2, model.config.audio_channels, 480)
    codes = model.encode(audio)
    assert joined == [False]
    y = model.decode(codes)
    assert joined == [False, True]
    with mock.patch.object(Codec, "ops", dispatch.bind("cpu", torch.float32, "reference")):
        assert torch.equal(model.encode(audio), codes)
        assert relative_error(y, model.decode(codes)) < 1e-6


@pytest.mark.parametrize("name", ["shortcut", "replicate", "reflect", "not_causal"])
@torch.no_grad()
def test_other_paddings_and_shortcuts_are_not_joined(joined, name):
    model = small_model(name, **SHORT)
    model.decode(model.encode(noise(1, 1, 480)))
    assert not joined


@torch.no_grad()
def test_streams_are_not_joined(joined):
    model = small_model(**SHORT)
    state = model.new_state(2)
    model.decode(model.encode(noise(2, 1, model.frame_size), state=state), state=state)
    assert not joined


@pytest.mark.parametrize("layer", ["0", "1"])
@torch.no_grad()
def test_hooks_of_either_layer_are_called(joined, layer):
    model, called = small_model(**SHORT), []
    model.encoder.layers[layer].register_forward_hook(lambda *_: called.append(layer))
    model.decode(model.encode(noise(1, 1, 480)))
    assert called == [layer] and joined == [True]
