"""Recorded programs of streams: bit-identical to eager steps, recorded only by a warm-up, dropped after a change."""

import copy
import pickle

import pytest
import torch

from fastmimi import InputError
from fastmimi.devtools.testing import noise, small_model
from fastmimi.kernels.cpu import _native
from fastmimi.runtime import packing

pytestmark = pytest.mark.skipif(not _native.variants(), reason="the native library is not built here")
FRAMES = 7
CHANGES = [
    {}, {"pad_mode": "replicate"}, {"frame_rate": None}, {"attention_bias": True}, {"use_conv_shortcut": True},
]  # fmt: skip


class NoGraphs:
    """Takes the place of CpuGraphs and records nothing: every step is eager."""

    def run(self, *arguments):
        return None

    def record(self, *arguments):
        pass

    def forget(self):
        pass


class Scaled(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, context):
        return self.layer(x, context) * 1.5


def pair(**changes):
    """Two models of the same weights: one records programs, the other does not."""
    models = [small_model(num_hidden_layers=2, **changes) for _ in range(2)]
    models[1].graphs = {"encode": NoGraphs(), "decode": NoGraphs()}
    return models


def number_of_programs(model):
    return sum(len(idle) for programs in model.graphs.values() for idle in programs._idle.values())


def stream(models, frames=FRAMES, batch=1, before=None):
    """Codes and audio of each model, frame by frame in turn; `before(i, model, state)` is called before each frame."""
    audio = noise(batch, 1, frames * models[0].frame_size, seed=1, scale=1.0)
    states, results = [model.new_state(batch) for model in models], [[] for _ in models]
    for model, state in zip(models, states, strict=True):
        model.warm_up(state)
    for i, frame in enumerate(audio.split(models[0].frame_size, dim=-1)):
        for model, state, result in zip(models, states, results, strict=True):
            if before is not None:
                before(i, model, state)
            codes = model.encode(frame, state=state)
            result += [codes, model.decode(codes.clamp(min=0), state=state)]
    for mine, eager in zip(states[0].state_dict().values(), states[1].state_dict().values(), strict=True):
        assert torch.equal(mine, eager)
    return results


def assert_equal(results):
    assert all(torch.equal(mine, eager) for mine, eager in zip(*results, strict=True))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_programs_are_bit_identical_to_eager_steps(batch, changes):
    models = pair(**changes)
    assert_equal(stream(models, batch=batch))
    assert number_of_programs(models[0]) == 2


def test_programs_in_bf16():
    models = [model.bfloat16() for model in pair()]
    assert_equal(stream(models))
    assert number_of_programs(models[0]) == 2


def test_masked_and_reset_rows():
    def before(i, model, state):
        state.exec_mask[:] = torch.tensor([True, i % 3 != 1, True])
        if i == FRAMES - 4:
            state.reset(torch.tensor([False, False, True]))

    models = pair()
    assert_equal(stream(models, batch=3, before=before))
    assert number_of_programs(models[0]) == 2


def edit_a_weight(model):
    model.encoder.layers["0"].conv.weight.mul_(0.5)


def replace_a_weight(model):
    mlp = model.decoder_transformer.layers[0].mlp
    mlp.fc1.weight = torch.nn.Parameter(mlp.fc1.weight.detach() * 0.5)


def replace_a_module(model):
    model.encoder.layers["0"] = copy.deepcopy(model.encoder.layers["0"])
    model.encoder.layers["0"].conv.bias.add_(0.1)


def replace_a_half(model):
    model.decoder = copy.deepcopy(model.decoder)
    model.decoder.layers["0"].conv.bias.add_(0.1)


def edit_a_codebook(model):
    model.quantizer.acoustic_residual_vector_quantizer.layers[1].codebook.embed_sum.mul_(-1)


def edit_a_projection(model):
    model.quantizer.acoustic_residual_vector_quantizer.output_proj.weight.mul_(0.5)


def fewer_codebooks(model):
    model.num_codebooks = 3


EDITS = [
    edit_a_weight, replace_a_weight, replace_a_module, replace_a_half, edit_a_codebook, edit_a_projection,
    fewer_codebooks,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edits_drop_the_programs(edit):
    counts = []

    def before(i, model, state):
        if i == FRAMES - 2:
            counts.append(number_of_programs(model) if model is models[0] else 0)
            with torch.no_grad():
                edit(model)

    models = pair()
    results = stream(models, before=before)
    assert_equal(results)
    assert counts == [2, 0]
    unedited = stream(pair())
    assert not all(map(torch.equal, results[0][-4:], unedited[0][-4:])), "the edit changes nothing"


def test_training_mode_uses_no_programs():
    """Results with dropout are random; they must differ from those of the recorded steps, which have none."""
    model = small_model(attention_dropout=0.5)
    state, audio = model.new_state(1), noise(1, 1, model.frame_size, scale=1.0)
    model.warm_up(state, latents=True)
    latents = [model.encode_to_latent(audio, state=state.clone()) for _ in range(3)]
    assert number_of_programs(model) == 2 and torch.equal(latents[0], latents[-1])
    model.train()
    random = [model.encode_to_latent(audio, state=state.clone()) for _ in range(3)]
    assert not torch.equal(random[-1], latents[0]) and not torch.equal(random[-1], random[-2])


def test_recording_does_not_advance_the_global_generator():
    before = torch.random.get_rng_state()
    models = pair()
    stream(models)
    assert number_of_programs(models[0]) == 2 and torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_recorded_without_a_warm_up():
    model = small_model(num_hidden_layers=1)
    state, audio = model.new_state(1), noise(1, 1, model.frame_size)
    model.decode(model.encode(audio, state=state), state=state)
    before = packing.preparations()
    for _ in range(20):
        model.decode(model.encode(audio, state=state), state=state)
    assert packing.preparations() == before and number_of_programs(model) == 0


@pytest.mark.parametrize("impl", ["auto", "onednn", "reference"])
def test_after_a_warm_up_no_frame_packs_or_records(impl):
    model = small_model(num_hidden_layers=1)
    model.impl = impl
    state, audio = model.new_state(2), noise(2, 1, model.frame_size)
    model.warm_up(state, num_codebooks=4)
    before = packing.preparations()
    for _ in range(20):
        model.decode(model.encode(audio, state=state, num_codebooks=4), state=state)
    assert packing.preparations() == before and number_of_programs(model) == (2 if impl == "auto" else 0)


def test_a_warm_up_does_not_change_the_state():
    model = small_model(num_hidden_layers=1)
    state = model.new_state(1)
    model.encode(noise(1, 1, 3 * model.frame_size + 7), state=state)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    model.warm_up(state)
    assert number_of_programs(model) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_steps_of_several_frames(frames):
    models = pair()
    states = [model.new_state(1) for model in models]
    models[0].warm_up(states[0], frames=frames)
    runs = []
    for recorded in models[0].graphs.values():
        [[(program, _)]] = recorded._idle.values()
        run = program.run
        program.run = lambda *arguments, run=run: runs.append(1) or run(*arguments)
    for i in range(3):
        audio = noise(1, 1, frames * models[0].frame_size, seed=i, scale=1.0)
        codes = [model.encode(audio, state=state) for model, state in zip(models, states, strict=True)]
        sound = [model.decode(codes[0], state=state) for model, state in zip(models, states, strict=True)]
        assert_equal([[codes[0], sound[0]], [codes[1], sound[1]]])
    assert len(runs) == 6


def test_a_program_for_each_direction_and_thread():
    model = small_model(num_hidden_layers=1)
    model.warm_up(model.new_state(1), threads=3)
    assert number_of_programs(model) == 6
    model.warm_up(model.new_state(1), threads=2)
    assert number_of_programs(model) == 6


@pytest.mark.parametrize("options, sentence", [
    ({"frames": 0}, "frames must be from 1 to 4 and threads positive, got 0 and 1"),
    ({"frames": 5}, "frames must be from 1 to 4 and threads positive, got 5 and 1"),
    ({"threads": 0}, "frames must be from 1 to 4 and threads positive, got 1 and 0"),
    ({"num_codebooks": 7}, "the number of codebooks must be from 1 to 6, got 7"),
])  # fmt: skip
def test_invalid_warm_ups_are_refused(options, sentence):
    model = small_model(num_hidden_layers=1)
    with pytest.raises(InputError, match=sentence):
        model.warm_up(model.new_state(1), **options)
    with pytest.raises(InputError, match="state must come from"):
        model.warm_up(None)


def test_other_backends_record_no_programs():
    models = pair()
    stream(models)
    for model in models:
        model.impl = "reference"
    before = number_of_programs(models[0])
    assert_equal(stream(models))
    assert number_of_programs(models[0]) == before


def test_states_share_programs():
    models = pair()
    for _ in range(2):
        assert_equal(stream(models))
    assert number_of_programs(models[0]) == 2


def test_a_direction_with_other_operations_is_not_recorded():
    models = pair()
    for model in models:
        model.encoder.layers["1"] = Scaled(model.encoder.layers["1"])
    assert_equal(stream(models))
    assert number_of_programs(models[0]) == 1, "only decoding is recorded"


def test_hooks_are_called_despite_programs():
    calls = []

    def before(i, model, state):
        if i == FRAMES - 3:
            model.encoder.layers["0"].register_forward_hook(lambda *_: calls.append(model))

    models = pair()
    assert_equal(stream(models, before=before))
    assert len(calls) == 6


def test_moved_models_have_no_programs():
    models = pair()
    stream(models)
    models[0].bfloat16()
    assert number_of_programs(models[0]) == 0


def test_chunks_of_partial_frames_share_programs():
    model = small_model(num_hidden_layers=1)
    state = model.new_state(1)
    model.warm_up(state)
    audio = noise(1, 1, 30 * model.frame_size, scale=1.0)
    codes = [model.encode(chunk, state=state) for chunk in audio.split(model.frame_size * 7 // 10, dim=-1)]
    assert number_of_programs(model) == 2
    assert torch.equal(torch.cat([*codes, model.flush(state)], dim=-1)[..., :30], model.encode(audio))


def test_states_of_another_model_are_refused():
    model, other = small_model(num_hidden_layers=1), small_model(num_hidden_layers=1, sliding_window=7)
    frame, state = noise(1, 1, model.frame_size), model.new_state(1)
    model.warm_up(state)
    with pytest.raises(ValueError, match="the state is for a model of another configuration"):
        model.encode(frame, state=other.new_state(1))


def test_copies_have_no_programs():
    models = pair()
    stream(models)
    for copied in (copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))):
        assert number_of_programs(copied) == 0
        assert_equal(stream([copied, models[1]]))
