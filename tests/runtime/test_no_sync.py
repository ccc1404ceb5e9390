"""Encode, decode and streams never wait for a GPU: on the meta device, where there are no values, reading one fails."""

import copy
import pickle

import pytest
import torch

from fastmimi.devtools.testing import noise, small_model
from fastmimi.errors import InputError
from fastmimi.models import checks

BATCH = 3
META = torch.device("meta")


@pytest.fixture
def model(monkeypatch):
    """A model whose tensors have no values, and whose inputs may be such tensors too."""
    monkeypatch.setattr(checks, "_values", lambda x, name: None)
    return small_model().to("meta")


def audio_of(model, frames):
    return torch.empty(BATCH, 1, frames * model.frame_size, device="meta")


def test_whole_clips(model):
    codes = model.encode(audio_of(model, 5))
    assert codes.is_meta and codes.shape[::2] == (BATCH, 5)
    assert model.decode(codes).shape == (BATCH, 1, 5 * model.frame_size)


@pytest.mark.parametrize("samples", ["whole frames", "in between"])
def test_streams(model, samples):
    state = model.new_state(BATCH)
    state.exec_mask = torch.tensor([True] * BATCH)
    state._mask_version = state._exec_mask._version  # as if it had been copied once
    size = 2 * model.frame_size if samples == "whole frames" else model.frame_size + 7
    for _ in range(3):
        codes = model.encode(torch.empty(BATCH, 1, size, device="meta"), state=state)
        assert model.decode(codes, state=state).shape[-1] == codes.shape[-1] * model.frame_size


def test_reading_a_value_would_fail(model):
    with pytest.raises((RuntimeError, NotImplementedError)):
        audio_of(model, 1).amax().item()


def test_invalid_inputs_are_marked(monkeypatch):
    """On a GPU such inputs are replaced and their rows marked; nothing is raised. Here the CPU stands in for one."""
    model = small_model()
    good = noise(BATCH, 1, 2 * model.frame_size)
    bad = good.clone()
    bad[1, 0, 5] = torch.nan
    expected, silenced = model.encode(good), model.encode(bad.nan_to_num())
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    codes = model.encode(bad)
    assert torch.equal(codes[::2], expected[::2]) and (codes[1] == -1).all()
    audio = model.decode(codes)
    assert audio[1].isnan().all() and audio[::2].isfinite().all()
    state = model.new_state(BATCH)
    state.check()
    assert torch.equal(model.encode(bad, state=state), silenced)
    with pytest.raises(InputError, match=r"streams \[1\] were given"):
        state.check()
    state.reset(torch.tensor([False, True, False]))
    state.check()
    broken = expected.clone()
    broken[2, 0, 1] = 10**6
    assert model.decode(broken, state=state).isfinite().all()
    with pytest.raises(InputError, match=r"streams \[2\] were given"):
        state.check()


def test_inputs_on_another_accelerator(model, monkeypatch):
    """Here the CPU stands in for it, and the meta device for the model's."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    audio, codes = noise(BATCH, 1, model.frame_size), torch.zeros(BATCH, 6, 1, dtype=torch.int64)
    state = model.new_state(BATCH)
    assert model.encode(audio).is_meta and model.encode(audio, state=state).is_meta
    assert model.decode(codes).is_meta and model.decode(codes, state=state).is_meta and model.dequantize(codes).is_meta


def test_a_mask_for_an_accelerator():
    """Whose model is on the CPU: the mask must be where the input is."""
    assert small_model().new_state(BATCH).mask_on(META).device == META


@pytest.mark.parametrize("way", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)), lambda s: s.clone()])
def test_a_copied_state_has_its_own_mask(way, monkeypatch):
    """Edits of a mask are counted, and the count of a copied tensor may be that of a mask long gone."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from a GPU
    state, mask = small_model().new_state(BATCH), torch.tensor([True, False, True])
    state.exec_mask = ~mask
    state.mask_on(META)
    state.exec_mask = mask
    copied = way(state)
    copied.mask_on(META)
    assert torch.equal(copied._mask_at_hand, mask)


def test_masks_of_states_copied_in_inference_mode(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from a GPU
    with torch.inference_mode():
        state, mask = copy.deepcopy(small_model().new_state(BATCH)), torch.tensor([True, False, True])
        state.mask_on(META)
        state.exec_mask = mask
        state.mask_on(META)
    assert torch.equal(state._mask_at_hand, mask)


def test_restored_streams_are_valid():
    state = small_model().new_state(BATCH)
    good = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    state.note_invalid(torch.tensor([False, True, False]))
    state.load_state_dict(good)
    state.check()
