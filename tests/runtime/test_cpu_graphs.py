"""Recorded programs of streams: the same bits as the model's own steps, none unless asked for or after a change."""

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


class Plain:
    """In the place of CpuGraphs: steps of the model itself."""

    def run(self, *arguments):
        return None

    def record(self, *arguments):
        pass

    def forget(self):
        pass


class Louder(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, call):
        return self.layer(x, call) * 1.5


def pair(**changes):
    """Two models of the same weights: one records programs, one does not."""
    models = [small_model(num_hidden_layers=2, **changes) for _ in range(2)]
    models[1].graphs = {"encode": Plain(), "decode": Plain()}
    return models


def programs(model):
    return sum(len(idle) for programs in model.graphs.values() for idle in programs._idle.values())


def stream(models, frames=FRAMES, batch=1, before=None):
    """Codes and audio of each model, frame by frame in turn; `before(i, model, state)` comes before a frame."""
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
    for mine, plain in zip(states[0].state_dict().values(), states[1].state_dict().values(), strict=True):
        assert torch.equal(mine, plain)
    return results


def assert_equal(results):
    assert all(torch.equal(mine, plain) for mine, plain in zip(*results, strict=True))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def testgraphs_give_the_models_bits(batch, changes):
    models = pair(**changes)
    assert_equal(stream(models, batch=batch))
    assert programs(models[0]) == 2


def test_in_bf16():
    models = [model.bfloat16() for model in pair()]
    assert_equal(stream(models))
    assert programs(models[0]) == 2


def test_masked_and_reset_rows():
    def before(i, model, state):
        state.exec_mask[:] = torch.tensor([True, i % 3 != 1, True])
        if i == FRAMES - 4:
            state.reset(torch.tensor([False, False, True]))

    models = pair()
    assert_equal(stream(models, batch=3, before=before))
    assert programs(models[0]) == 2


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
def test_edits_count(edit):
    had = []

    def before(i, model, state):
        if i == FRAMES - 2:
            had.append(programs(model) if model is models[0] else 0)
            with torch.no_grad():
                edit(model)

    models = pair()
    results = stream(models, before=before)
    assert_equal(results)
    assert had == [2, 0]
    unedited = stream(pair())
    assert not all(map(torch.equal, results[0][-4:], unedited[0][-4:])), "the edit changes nothing"


def test_training_mode_counts():
    """Dropout draws: nothing to compare with, but it must not be the recorded step without it."""
    model = small_model(attention_dropout=0.5)
    state, audio = model.new_state(1), noise(1, 1, model.frame_size, scale=1.0)
    model.warm_up(state, latents=True)
    latents = [model.encode_to_latent(audio, state=state.clone()) for _ in range(3)]
    assert programs(model) == 2 and torch.equal(latents[0], latents[-1])
    model.train()
    drawn = [model.encode_to_latent(audio, state=state.clone()) for _ in range(3)]
    assert not torch.equal(drawn[-1], latents[0]) and not torch.equal(drawn[-1], drawn[-2])


def test_recording_draws_nothing_from_the_global_generator():
    before = torch.random.get_rng_state()
    models = pair()
    stream(models)
    assert programs(models[0]) == 2 and torch.equal(torch.random.get_rng_state(), before)


def test_a_stream_records_nothing_by_itself():
    model = small_model(num_hidden_layers=1)
    state, audio = model.new_state(1), noise(1, 1, model.frame_size)
    model.decode(model.encode(audio, state=state), state=state)
    before = packing.preparations()
    for _ in range(20):
        model.decode(model.encode(audio, state=state), state=state)
    assert packing.preparations() == before and programs(model) == 0


@pytest.mark.parametrize("impl", ["auto", "onednn", "reference"])
def test_after_a_warm_up_no_frame_waits(impl):
    model = small_model(num_hidden_layers=1)
    model.impl = impl
    state, audio = model.new_state(2), noise(2, 1, model.frame_size)
    model.warm_up(state, num_codebooks=4)
    before = packing.preparations()
    for _ in range(20):
        model.decode(model.encode(audio, state=state, num_codebooks=4), state=state)
    assert packing.preparations() == before and programs(model) == (2 if impl == "auto" else 0)


def test_a_warm_up_leaves_the_state_alone():
    model = small_model(num_hidden_layers=1)
    state = model.new_state(1)
    model.encode(noise(1, 1, 3 * model.frame_size + 7), state=state)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    model.warm_up(state)
    assert programs(model) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_steps_of_several_frames(frames):
    models = pair()
    states = [model.new_state(1) for model in models]
    models[0].warm_up(states[0], frames=frames)
    taken = []
    for recorded in models[0].graphs.values():
        [[(program, _)]] = recorded._idle.values()
        run = program.run
        program.run = lambda *arguments, run=run: taken.append(1) or run(*arguments)
    for i in range(3):
        audio = noise(1, 1, frames * models[0].frame_size, seed=i, scale=1.0)
        codes = [model.encode(audio, state=state) for model, state in zip(models, states, strict=True)]
        sound = [model.decode(codes[0], state=state) for model, state in zip(models, states, strict=True)]
        assert_equal([[codes[0], sound[0]], [codes[1], sound[1]]])
    assert len(taken) == 6


def test_as_manygraphs_as_threads():
    model = small_model(num_hidden_layers=1)
    model.warm_up(model.new_state(1), threads=3)
    assert programs(model) == 6
    model.warm_up(model.new_state(1), threads=2)
    assert programs(model) == 6


@pytest.mark.parametrize("options, sentence", [
    ({"frames": 0}, "frames must be from 1 to 4 and threads positive, got 0 and 1"),
    ({"frames": 5}, "frames must be from 1 to 4 and threads positive, got 5 and 1"),
    ({"threads": 0}, "frames must be from 1 to 4 and threads positive, got 1 and 0"),
    ({"num_codebooks": 7}, "the number of codebooks must be from 1 to 6, got 7"),
])  # fmt: skip
def test_a_wrong_warm_up(options, sentence):
    model = small_model(num_hidden_layers=1)
    with pytest.raises(InputError, match=sentence):
        model.warm_up(model.new_state(1), **options)
    with pytest.raises(InputError, match="state must come from"):
        model.warm_up(None)


def test_another_choice_of_kernels_is_not_a_program():
    models = pair()
    stream(models)
    for model in models:
        model.impl = "reference"
    before = programs(models[0])
    assert_equal(stream(models))
    assert programs(models[0]) == before


def test_states_share_a_program():
    models = pair()
    for _ in range(2):
        assert_equal(stream(models))
    assert programs(models[0]) == 2


def test_what_pytorch_computes_between_the_layers_is_noticed():
    models = pair()
    for model in models:
        model.encoder.layers["1"] = Louder(model.encoder.layers["1"])
    assert_equal(stream(models))
    assert programs(models[0]) == 1, "only decoding is recorded"


def test_hooks_are_called():
    calls = []

    def before(i, model, state):
        if i == FRAMES - 3:
            model.encoder.layers["0"].register_forward_hook(lambda *_: calls.append(model))

    models = pair()
    assert_equal(stream(models, before=before))
    assert len(calls) == 6


def test_moved_models_hold_nographs():
    models = pair()
    stream(models)
    models[0].bfloat16()
    assert programs(models[0]) == 0


def test_chunks_that_leave_views_share_a_program():
    model = small_model(num_hidden_layers=1)
    state = model.new_state(1)
    model.warm_up(state)
    audio = noise(1, 1, 30 * model.frame_size, scale=1.0)
    parts = [model.encode(part, state=state) for part in audio.split(model.frame_size * 7 // 10, dim=-1)]
    assert programs(model) == 2
    assert torch.equal(torch.cat([*parts, model.flush(state)], dim=-1)[..., :30], model.encode(audio))


def test_states_of_another_model_are_refused():
    model, other = small_model(num_hidden_layers=1), small_model(num_hidden_layers=1, sliding_window=7)
    frame, state = noise(1, 1, model.frame_size), model.new_state(1)
    model.warm_up(state)
    with pytest.raises(ValueError, match="the state is for a model of another configuration"):
        model.encode(frame, state=other.new_state(1))


def test_copies_begin_empty():
    models = pair()
    stream(models)
    for copied in (copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))):
        assert programs(copied) == 0
        assert_equal(stream([copied, models[1]]))
