"""`accelerate` against Pocket TTS's own Mimi with the same weights: latents and audio within 1e-5 of the peak."""

import copy
import gc
import json
import weakref

import pocket
import pytest
import torch

pocket_tts = pytest.importorskip("pocket_tts", reason="parity with Pocket TTS needs pocket-tts")
from pocket_tts.modules.stateful_module import StatefulModule, increment_steps, init_states  # noqa: E402

import fastmimi  # noqa: E402
from fastmimi.compat import pocket_tts as drop_in  # noqa: E402
from fastmimi.devtools.testing import noise, relative_error  # noqa: E402
from fastmimi.runtime import packing  # noqa: E402

CONFIGS = {name: config.mimi for name, config in pocket.published().items()}
DISTINCT = list({config.model_dump_json(exclude={"weights_path"}): name for name, config in CONFIGS.items()}.values())
SMALLEST = "english_2m_2026-10"


def small(**changes):
    """A narrow Mimi whose halves differ; `changes` are of the section `mimi`."""
    config = CONFIGS["english"]
    seanet = config.seanet.model_copy(update={"dimension": 32, "n_filters": 4})
    narrow = {"d_model": 32, "input_dimension": 32, "output_dimensions": (32,), "num_heads": 4, "dim_feedforward": 48}
    decoder = {"d_model": 24, "input_dimension": 24, "output_dimensions": (24,), "num_heads": 3, "num_layers": 3}
    transformer = config.transformer.model_copy(update={**narrow, "context": 40})
    values = {
        "seanet": seanet, "transformer": transformer, "inner_dim": 6, "outer_dim": 24,
        "quantizer": config.quantizer.model_copy(update={"dimension": 8, "output_dimension": 24}),
        "decoder_seanet": seanet.model_copy(update={"dimension": 24, "n_filters": 6, "kernel_size": 3}),
        "decoder_transformer": transformer.model_copy(update={**decoder, "context": 21, "max_period": 500.0}),
    }  # fmt: skip
    return config.model_copy(update={**values, **changes})


def pair_of(config):
    peer = pocket.random_mimi(config)
    return peer, drop_in.AcceleratedMimi(peer, drop_in.codec_config(config.model_dump()))


@pytest.fixture(scope="module", params=["small", *(pytest.param(name, marks=pytest.mark.slow) for name in DISTINCT)])
def pair(request):
    """Their Mimi and ours, with the same weights."""
    return pair_of(CONFIGS.get(request.param) or small())


@pytest.fixture(scope="module")
def small_pair():
    return pair_of(small())


@pytest.fixture(scope="module")
def tts(tmp_path_factory):
    return pocket.random_tts(SMALLEST, tmp_path_factory.mktemp("tts"))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_configuration_is_supported(name):
    config = drop_in.codec_config(CONFIGS[name].model_dump())
    assert (config.sampling_rate, config.frame_size, config.latent_stride, config.streamable) == (
        24_000,
        1920,
        16,
        True,
    )


@pytest.mark.parametrize("samples", [1, pocket.FRAME, 30 * pocket.FRAME + 77])
def test_encode(pair, samples):
    peer, mine = pair
    audio = noise(2, 1, samples, seed=samples)
    theirs = peer.encode_to_latent(audio)
    assert relative_error(mine.encode_to_latent(audio), theirs) < 1e-5


def test_decode_in_chunks_of_any_number_of_frames(pair):
    peer, mine = pair
    latents = noise(1, 36, mine.core.config.latent_size, scale=1.0)  # 576 positions, beyond every context
    truth = pocket.decode(peer, latents)
    for sizes in (None, [1] * 36, [1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 26]):
        audio = pocket.decode(mine, latents, sizes)
        assert relative_error(audio, truth) < 1e-5
        assert relative_error(audio, pocket.decode(peer, latents, sizes)) < 1e-5


def test_a_batch_of_generations(small_pair):
    peer, mine = small_pair
    latents = noise(3, 5, 8, scale=1.0)
    assert relative_error(pocket.decode(mine, latents, [1] * 5), pocket.decode(peer, latents, [1] * 5)) < 1e-5


def test_generations_are_independent_and_may_take_turns(small_pair):
    peer, mine = small_pair
    latents = noise(2, 6, 8, scale=1.0)
    states, parts = [init_states(mine, 1, 1000) for _ in latents], [[], []]
    for i in range(6):
        if i == 3:
            states[0] = copy.deepcopy(states[0])
        for row, state in enumerate(states):
            parts[row].append(mine.decode_from_latent(latents[row : row + 1, i : i + 1], state))
            increment_steps(mine, state, pocket.POSITIONS)
    for row in range(2):
        truth = pocket.decode(peer, latents[row : row + 1])
        assert relative_error(torch.cat(parts[row], dim=-1), truth) < 1e-5


def test_positions_are_counted_by_increment_steps(small_pair):
    _, mine = small_pair
    state = init_states(mine, 1, 1000)
    assert list(state) == [""]
    mine.decode_from_latent(noise(1, 2, 8), state)
    assert state[""]["offset"].tolist() == [0]
    increment_steps(mine, state, 32)
    assert state[""]["offset"].tolist() == [32]


def test_the_result_is_a_new_tensor(small_pair):
    _, mine = small_pair
    latents = noise(1, 1, 8)
    first = mine.decode_from_latent(latents, init_states(mine, 1, 100))
    kept = first.clone()
    first *= 0
    assert torch.equal(mine.decode_from_latent(latents, init_states(mine, 1, 100)), kept) and not first.any()


def test_frames_are_recorded_steps_for_any_number_of_threads(small_pair):
    _, mine = small_pair
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        state = init_states(mine, 2, 100)
        prepared = packing.preparations()
        audio = [mine.decode_from_latent(noise(2, n, 8), state) for n in (1, 2, 3, 4)]
        assert packing.preparations() == prepared and all(torch.isfinite(chunk).all() for chunk in audio)
        idle = mine.core.graphs["decode"]._idle
        assert {(key[2][0], key[2][2]) for key in idle if key[-1] == 2} >= {(2, n) for n in (1, 2, 3, 4)}
    finally:
        torch.set_num_threads(before)


def test_parameters_are_shared_and_edits_are_followed():
    peer, mine = pair_of(small())
    theirs = {parameter.data_ptr() for parameter in peer.parameters()}
    assert {parameter.data_ptr() for parameter in mine.parameters()} == theirs
    latents, audio = noise(1, 3, 8, scale=1.0), noise(1, 1, 4000)
    before = pocket.decode(mine, latents, [1, 1, 1])
    for parameter in peer.parameters():
        parameter.mul_(1.1)
    after = pocket.decode(mine, latents, [1, 1, 1])
    assert relative_error(before, after) > 1e-3
    assert relative_error(after, pocket.decode(peer, latents)) < 1e-5
    assert relative_error(mine.encode_to_latent(audio), peer.encode_to_latent(audio)) < 1e-5


def test_attributes_and_modules(small_pair):
    peer, mine = small_pair
    for name in ("frame_rate", "encoder_frame_rate", "sample_rate", "channels", "dimension", "frame_size", "training"):
        assert getattr(mine, name) == getattr(peer, name)
    assert [name for name, module in mine.named_modules() if isinstance(module, StatefulModule)] == [""]


def test_their_test_of_a_decoder_with_its_own_dimensions():
    """As tests/test_model_options.py of Pocket TTS has it."""
    config = CONFIGS["english"]
    update = {"dimension": 64, "n_filters": 8, "kernel_size": 3}
    transformer = {
        "d_model": 64, "num_heads": 4, "num_layers": 1, "dim_feedforward": 128, "input_dimension": 64,
        "output_dimensions": (64,),
    }  # fmt: skip
    small = config.model_copy(
        update={
            "outer_dim": 64,
            "quantizer": config.quantizer.model_copy(update={"output_dimension": 64}),
            "decoder_seanet": config.seanet.model_copy(update=update),
            "decoder_transformer": config.transformer.model_copy(update=transformer),
        }
    )
    _, mimi = pair_of(small)
    assert mimi.core.config.decoder.hidden_size == 64 and mimi.core.config.encoder.hidden_size == 512
    audio = mimi.decode_from_latent(torch.randn(1, 3, config.quantizer.dimension), init_states(mimi, 1, 100))
    assert audio.shape == (1, 1, 3 * mimi.frame_size)


# Within a TTSModel


def generate(tts, seed=1):
    """Audio [N] of a cloned voice; the decoder thread runs beside the language model."""
    torch.manual_seed(seed)
    state = tts.get_state_for_audio_prompt(noise(1, 24_000, scale=0.1))
    return tts.generate_audio(state, pocket.text(4))


@pytest.mark.slow
def test_generate_audio_of_cloned_voices(tts):
    own, truth = tts.mimi, [generate(tts, seed) for seed in (1, 2)]
    assert drop_in.accelerate(tts) is tts and drop_in.accelerate(tts).mimi is tts.mimi is not own
    assert len(truth[0]) > 10_000
    for seed in (1, 2, 1):
        assert relative_error(generate(tts, seed), truth[seed - 1]) < 1e-5
    assert drop_in.restore(tts) is tts and drop_in.restore(tts).mimi is own
    assert relative_error(generate(tts, 1), truth[0]) < 1e-5  # how frames are grouped varies


@pytest.mark.slow
def test_a_restored_model_frees_ours(tts):
    keys, parameters = list(tts.state_dict()), sum(parameter.numel() for parameter in tts.parameters())
    mine = weakref.ref(drop_in.accelerate(tts).mimi.core)
    assert sum(parameter.numel() for parameter in tts.parameters()) == parameters
    drop_in.restore(tts)
    gc.collect()
    assert mine() is None and list(tts.state_dict()) == keys


@pytest.mark.slow
def test_states_of_voices_fit_both(tts, tmp_path):
    state = tts.get_state_for_audio_prompt(noise(1, 24_000, scale=0.1))
    pocket_tts.export_model_state(state, tmp_path / "voice.safetensors")
    torch.manual_seed(3)
    truth = tts.generate_audio(state, pocket.text(2))
    drop_in.accelerate(tts)
    torch.manual_seed(3)
    voice = tts.get_state_for_audio_prompt(tmp_path / "voice.safetensors")
    assert relative_error(tts.generate_audio(voice, pocket.text(2)), truth) < 1e-5
    drop_in.restore(tts)


def test_a_checkpoint_loads_as_a_codec(small_pair, tmp_path):
    """A file of a whole TTSModel, whose language model is left out, with a config.json of ours beside it."""
    from safetensors.torch import save_file

    peer, mine = small_pair
    tensors = {f"mimi.{name}": tensor for name, tensor in peer.state_dict().items()}
    save_file({**tensors, "flow_lm.bos_emb": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(mine.core.config.to_dict()))
    codec, latents = fastmimi.load(tmp_path / "model.safetensors"), noise(1, 4, 8, scale=1.0)
    assert relative_error(codec.decode_latent(latents.mT), pocket.decode(peer, latents)) < 1e-5
    fastmimi.save_pretrained(codec, tmp_path / "ours")
    again = fastmimi.load(tmp_path / "ours")
    assert torch.equal(codec.decode_latent(latents.mT), again.decode_latent(latents.mT))


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_configurations_are_inferred_from_published_shapes(name):
    from fastmimi.checkpoints import kyutai, shapes

    with torch.device("meta"):
        state = pocket.random_mimi(CONFIGS[name]).state_dict()
    found = shapes.infer_config(kyutai.mimi_of({f"mimi.{key}": tensor for key, tensor in state.items()}))
    assert found == drop_in.codec_config(CONFIGS[name].model_dump())


# Errors


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 8), (2, 1, 8)])
def test_latents_of_a_wrong_shape(small_pair, shape):
    _, mine = small_pair
    with pytest.raises(fastmimi.InputError, match="latent must"):
        mine.decode_from_latent(torch.zeros(shape), init_states(mine, 1, 100))


def test_states_of_the_other_mimi(small_pair):
    peer, mine = small_pair
    with pytest.raises(fastmimi.InputError, match="after accelerate"):
        mine.decode_from_latent(torch.zeros(1, 1, 8), init_states(peer, 1, 100))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"outer_dim": 48}, "mimi.outer_dim must be 24, got 48"),
        ({"frame_rate": 13.0}, "frame_rate must divide"),
        ({"channels": 2}, "mimi.seanet.channels must be 2, got 1"),
        ({"decoder_transformer": None}, "mimi.transformer.d_model must be 24, got 32"),
    ],
)
def test_configurations_that_are_not_supported(changes, message):
    with pytest.raises(fastmimi.InputError, match=message):
        drop_in.codec_config(small(**changes).model_dump())


@pytest.mark.parametrize("function", [drop_in.accelerate, drop_in.restore])
def test_what_is_no_tts_model(function):
    with pytest.raises(fastmimi.InputError, match=r"must be a pocket_tts\.TTSModel, got dict"):
        function({})


@pytest.mark.parametrize("change", ["missing", "another shape", "unknown"])
def test_a_mimi_of_another_configuration_is_left_as_it_is(change):
    config = small()
    peer = pocket.random_mimi(config)
    if change == "missing":
        del peer.downsample
    elif change == "unknown":
        peer.downsample.other = torch.nn.Linear(2, 2)
    else:
        peer.downsample.conv.conv = torch.nn.Conv1d(32, 7, 32, stride=16, bias=False)
    before = dict(peer.named_modules())
    with pytest.raises(fastmimi.InputError, match=r"layers of its configuration, and downsample.* differs"):
        drop_in.AcceleratedMimi(peer, drop_in.codec_config(config.model_dump()))
    assert dict(peer.named_modules()) == before
