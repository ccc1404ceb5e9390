"""Comparison by layer: it names the layers that differ and only those, and removes its hooks."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import fastmimi
from fastmimi import InputError, JodioConfig
from fastmimi.checkpoints import weights
from fastmimi.devtools.compare import RESULT, compare, record
from fastmimi.devtools.testing import noise, small_model

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples
AUDIO = noise(2, 1, 500)


def streamed(model, audio, size):
    state = model.new_state(2)
    for chunk in audio.split(size, dim=-1):
        yield model.encode(chunk, state=state)
    yield model.flush(state)


def jodio():
    return weights.random(JodioConfig.small()).eval().requires_grad_(False)


@pytest.mark.parametrize("model", [small_model(**FAST), jodio()], ids=["mimi", "jodio"])
def test_a_stream_and_one_call(model):
    audio = noise(2, 1, 10 * model.frame_size + 20)
    whole = record(model, lambda: model.encode(audio))
    found = compare(whole, record(model, lambda: streamed(model, audio, 3 * model.frame_size // 2)))
    assert found.first is None and "<- first" not in str(found)
    layers = [row.layer for row in found.rows]
    assert layers[-1] == RESULT and layers.index("encoder") < layers.index("encoder_transformer")
    assert "encoder_transformer.layers.0" in layers and len(layers) > 12
    assert all(len(row.shape) == 3 and row.shape[0] == 2 for row in found.rows)


def test_the_first_layer_that_differs_is_named():
    model, other = small_model(**FAST), small_model(**FAST)
    other.encoder.layers["6"].conv.weight.data[3] *= 1.01
    found = compare(record(model, lambda: model.encode(AUDIO)), record(other, lambda: other.encode(AUDIO)))
    assert found.first is not None and found.first.layer == "encoder.layers.6" and found.first.first == 0
    assert 1e-5 < found.first.difference < 0.02
    assert [line.split()[0] for line in str(found).splitlines() if "<- first" in line] == ["encoder.layers.6"]


def test_the_first_time_that_differs():
    model = small_model(**FAST)
    later = AUDIO.clone()
    later[..., 300:] += 0.1
    found = compare(record(model, lambda: model.encode(AUDIO)), record(model, lambda: model.encode(later)))
    assert found.first is not None and (found.first.layer, found.first.first) == ("encoder.layers.0", 300)


def test_the_decoder_and_a_nan():
    model = small_model(**FAST)
    latents = noise(2, 32, 5)
    plain = record(model, lambda: model.decode_latent(latents))
    state = model.new_state(2)
    chunks = record(model, lambda: [model.decode_latent(chunk, state=state) for chunk in latents.split(2, dim=-1)])
    assert compare(plain, chunks).first is None
    chunks["decoder"][0, 0, 7] = torch.nan
    assert compare(plain, chunks).first == compare(plain, chunks).rows[-2]
    assert compare(plain, chunks).rows[-2].first == 7


def test_against_transformers(tmp_path):
    fastmimi.save_pretrained(small_model(), tmp_path)
    mine, peer = fastmimi.load(tmp_path), transformers.MimiModel.from_pretrained(tmp_path).eval()
    audio = noise(1, 1, 5 * mine.frame_size + 7)
    theirs = record(peer, lambda: peer.encode(audio).audio_codes)
    found = compare(record(mine, lambda: mine.encode(audio, last_frame="layers")), theirs)
    assert found.first is None, str(found)
    names = {row.layer for row in found.rows}
    assert {"encoder.layers.0", "encoder", "encoder_transformer.layers.1", "encoder_transformer", "downsample"} <= names


def test_hooks_are_removed_after_an_error():
    model = small_model(**FAST)
    with pytest.raises(InputError):
        record(model, lambda: model.encode(AUDIO * torch.nan))
    assert not any(module._forward_hooks for module in model.modules())


def test_results_that_cannot_be_compared():
    mine = record(nn.Sequential(nn.Identity()), lambda: torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="no layer in common: result, and x"):
        compare(mine, {"x": torch.zeros(1)})
    with pytest.raises(InputError, match=r"result must have the same shape .* got \(1, 2, 3\) and \(1, 1, 3\)"):
        compare(mine, {RESULT: torch.zeros(1, 1, 3)})
