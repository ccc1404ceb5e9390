"""Streaming: any chunking equals the whole; masks, resets and copies of states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fastmimi.devtools.testing import STREAMABLE, chunks, noise, relative_error, small_model

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples
MODEL = small_model(**FAST)


@pytest.fixture(scope="module", params=STREAMABLE)
def model(request):
    return small_model(request.param, **FAST)


@pytest.fixture(scope="module")
def small():
    return MODEL


def encode_in_chunks(model, audio, sizes, state):
    outputs = [model.encode(chunk, state=state) for chunk in audio.split(sizes, dim=-1)]
    return torch.cat([*outputs, model.flush(state)], dim=-1)


def decode_in_chunks(model, codes, sizes, state):
    return torch.cat([model.decode(chunk, state=state) for chunk in codes.split(sizes, dim=-1)], dim=-1)


@pytest.mark.parametrize("longest", [0.2, 1.7, 40])
def test_any_chunking_equals_the_whole(model, longest):
    """Chunks of up to `longest` frames; the audio is several times longer than the window (24 positions here)."""
    frame = model.frame_size
    samples = 60 * frame + 7
    audio = noise(2, model.config.audio_channels, samples)
    sizes = chunks(samples, seed=1, longest=max(1, int(longest * frame)))
    whole = model.encode(audio)
    assert torch.equal(encode_in_chunks(model, audio, sizes, model.new_state(2)), whole)
    audio_whole = model.decode(whole)
    sizes = chunks(whole.shape[-1], seed=2, longest=7 if longest > 1 else 1)
    assert relative_error(decode_in_chunks(model, whole, sizes, model.new_state(2)), audio_whole) < 1e-5


def test_one_sample_at_a_time(small):
    audio = noise(1, 1, small.frame_size + 3)
    assert torch.equal(encode_in_chunks(small, audio, [1] * audio.shape[-1], small.new_state(1)), small.encode(audio))


def test_flush_yields_nothing_after_whole_frames(small):
    state = small.new_state(2)
    assert small.encode(noise(2, 1, small.frame_size), state=state).shape == (2, 6, 1)
    assert small.flush(state).shape == (2, 6, 0)


def test_streams_of_latents(small):
    audio = noise(1, 1, 5 * small.frame_size)
    state = small.new_state(1)
    outputs = [small.encode_to_latent(chunk, state=state) for chunk in audio.split(25, dim=-1)]
    assert relative_error(torch.cat(outputs, dim=-1), small.encode_to_latent(audio)) < 1e-5
    latents = small.dequantize(small.encode(audio))
    outputs = [small.decode_latent(chunk, state=state) for chunk in latents.split(2, dim=-1)]
    assert relative_error(torch.cat(outputs, dim=-1), small.decode_latent(latents)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_and_reset_streams(data):
    """Three streams, some masked or reset at each step: each gives the codes of its audio since its last reset."""
    model, rows = MODEL, 3
    state = model.new_state(rows)
    fed = [[] for _ in range(rows)]
    codes = [[] for _ in range(rows)]
    for step in range(data.draw(st.integers(1, 6))):
        chunk = noise(rows, 1, data.draw(st.integers(0, 3 * model.frame_size)), seed=step)
        if data.draw(st.booleans()):
            mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
            state.reset(mask)
            for row in mask.nonzero()[:, 0].tolist():
                fed[row], codes[row] = [], []
        active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        state.exec_mask[:] = active
        out = model.encode(chunk, state=state)
        for row in range(rows):
            if active[row]:
                fed[row].append(chunk[row])
                codes[row].append(out[row, :, out[row, 0] >= 0])
            else:
                assert (out[row] == -1).all()
    state.exec_mask[:] = True
    last = model.flush(state)
    for row in range(rows):
        if fed[row]:
            whole = model.encode(torch.cat(fed[row], dim=-1)[None])[0]
            mine = torch.cat([*codes[row], last[row, :, last[row, 0] >= 0]], dim=-1)
            assert torch.equal(mine, whole)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_and_reset_decoding(data):
    model, rows = MODEL, 3
    state = model.new_state(rows)
    fed = [[] for _ in range(rows)]
    audio = [[] for _ in range(rows)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(data.draw(st.integers(1, 6))):
        codes = torch.randint(0, 64, (rows, 6, data.draw(st.integers(0, 30))), generator=generator)
        if data.draw(st.booleans()):
            mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
            state.reset(mask)
            for row in mask.nonzero()[:, 0].tolist():
                fed[row], audio[row] = [], []
        active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        state.exec_mask[:] = active
        out = model.decode(torch.where(active[:, None, None], codes, -1), state=state)
        for row in range(rows):
            if active[row]:
                fed[row].append(codes[row])
                audio[row].append(out[row])
            else:
                assert (out[row] == 0).all()
    for row in range(rows):
        if fed[row]:
            whole = model.decode(torch.cat(fed[row], dim=-1)[None])[0]
            assert relative_error(torch.cat(audio[row], dim=-1), whole) < 1e-5


def test_masked_rows_do_not_change(small):
    state = small.new_state(2)
    small.encode(noise(2, 1, 250), state=state)
    small.decode(torch.zeros(2, 6, 3, dtype=torch.int64), state=state)
    before = state.clone().state_dict()
    state.exec_mask[:] = torch.tensor([True, False])
    garbage = torch.full((1, 1, 400), float("nan"))
    small.encode(torch.cat([noise(1, 1, 400), garbage]), state=state)
    small.decode(torch.ones(2, 6, 3, dtype=torch.int64), state=state)
    small.flush(state)
    for name, tensor in state.state_dict().items():
        if name != "exec_mask":
            assert torch.equal(tensor[1], before[name][1]), name
            assert tensor.numel() == 0 or not torch.equal(tensor[0], before[name][0]), name


def test_clones_and_restored_states_continue_identically(small):
    audio, more = noise(1, 1, 500), noise(1, 1, 700, seed=1)
    state = small.new_state(1)
    small.encode(audio, state=state)
    copy, restored = state.clone(), small.new_state(1)
    restored.load_state_dict(load(save(state.state_dict())))
    outputs = [small.encode(more, state=s) for s in (state, copy, restored)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    whole = small.encode(torch.cat([audio, more], dim=-1))
    assert torch.equal(outputs[0], whole[..., 500 // small.frame_size :])


def test_buffers_keep_their_addresses(small):
    state = small.new_state(1)
    before = {name: tensor.data_ptr() for name, tensor in state.state_dict().items()}
    small.encode(noise(1, 1, 900), state=state)
    small.decode(torch.zeros(1, 6, 5, dtype=torch.int64), state=state)
    state.reset()
    assert before == {name: tensor.data_ptr() for name, tensor in state.state_dict().items()}


def test_a_state_made_in_inference_mode_works_outside_of_it(small):
    with torch.inference_mode():
        state = small.new_state(1)
        first = small.encode(noise(1, 1, 75), state=state)
    second = small.encode(noise(1, 1, 75, seed=1), state=state)
    whole = small.encode(torch.cat([noise(1, 1, 75), noise(1, 1, 75, seed=1)], dim=-1))
    assert torch.equal(torch.cat([first, second], dim=-1), whole[..., :3])


def test_a_clone_made_in_inference_mode_works_outside_of_it(small):
    with torch.inference_mode():
        state = small.new_state(1).clone()
    small.encode(noise(1, 1, small.frame_size), state=state)
    state.exec_mask = torch.tensor([False])


@pytest.mark.parametrize("name", ["not_causal", "reflect", "trim"])
def test_models_that_cannot_stream(name):
    with pytest.raises(ValueError, match="cannot stream"):
        small_model(name).new_state(1)


def test_bad_states(small):
    state = small.new_state(2)
    with pytest.raises(ValueError, match="for 2 streams"):
        small.encode(noise(1, 1, 100), state=state)
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 65536, got 0"):
        small.new_state(0)
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        state.reset(torch.ones(2))
    broken = {k: v for k, v in state.state_dict().items() if k != "pending"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing pending; unknown extra"):
        state.load_state_dict(broken)
    with pytest.raises(ValueError, match=r"torch\.float64.*make a new_state"):
        small_model(**FAST).double().encode(noise(2, 1, 100).double(), state=state)
    with pytest.raises(ValueError, match="exec_mask"):
        small.encode(noise(2, 1, 100), state=state, padding_mask=torch.ones(2, 100))


def test_the_summary_shows_the_position_of_each_stream():
    model = small_model()
    state = model.new_state(2)
    state.exec_mask = [True, False]
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    model.encode(noise(2, 1, model.frame_size + 5), state=state)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())
    text = state.summary()
    assert "2 streams, float32 on cpu" in text and "not finite" not in text
    assert "stream 0: encoded 2 positions, decoded 0, 5 samples pending" in text
    assert "stream 1: encoded 0 positions, decoded 0, 0 samples pending, masked" in text
    name = next(iter(state.decode.buffers))
    state.decode.buffers[name][1] = torch.inf
    assert state.summary().splitlines()[-1] == f"not finite: decode.{name}"
    assert "and 5 more streams" in model.new_state(25).summary()
