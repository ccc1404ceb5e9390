"""The moshi drop-in against moshi with the same weights: codes identical, audio within 1e-5 of the peak."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fastmimi.checkpoints.weights import save_kyutai
from fastmimi.compat import moshi as drop_in
from fastmimi.devtools.testing import assert_same_codes, lengths, noise, relative_error
from fastmimi.runtime.state import StreamState

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # moshi uses it

SEANET = {
    "channels": 1, "dimension": 32, "causal": True, "n_filters": 4, "n_residual_layers": 1, "activation": "ELU",
    "compress": 2, "dilation_base": 2, "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 3,
    "norm": "none", "pad_mode": "constant", "ratios": [8, 6, 5, 4], "true_skip": True,
}  # fmt: skip
QUANTIZER = {"dimension": 16, "n_q": 9, "bins": 64, "input_dimension": 32, "output_dimension": 32}
TRANSFORMER = {
    "d_model": 32, "num_heads": 4, "num_layers": 2, "causal": True, "layer_scale": 0.01, "context": 250,
    "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm",
    "positional_embedding": "rope", "dim_feedforward": 48, "input_dimension": 32, "output_dimensions": [32],
}  # fmt: skip


def small(seanet=(), quantizer=(), transformer=(), **top):
    """A mimi_config, as moshi takes it, for a small model; the arguments change it section by section."""
    sections = {"seanet": SEANET | dict(seanet), "quantizer": QUANTIZER | dict(quantizer)}
    sections["transformer"] = TRANSFORMER | dict(transformer)
    return {"sample_rate": 24_000, "channels": 1, "frame_rate": 12.5} | sections | top


CONFIGS = {
    "small": small(),
    "ratios": small(
        {"ratios": [6, 5, 4, 2], "kernel_size": 5, "last_kernel_size": 5, "compress": 4, "true_skip": False},
        transformer={"context": 24, "max_period": 500},
        frame_rate=50.0,
    ),
    "residual": small(
        {"n_residual_layers": 3, "dilation_base": 3, "residual_kernel_size": 5, "norm": "weight_norm"},
        {"n_q_semantic": 2},
    ),
    "stereo": small({"channels": 2}, transformer={"kv_repeat": 2, "context": 10}, channels=2),
    "not_resampled": small(frame_rate=25.0),
    "mimi": None,
}


def randomize(model):
    """Random biases, layer scales and codebooks instead of the initial zeros and ones, so that each affects results."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kind = name.rsplit(".", 1)[1]
            if kind in ("scale", "cluster_usage"):
                tensor.uniform_(0.2, 1.5, generator=generator)
            elif kind in ("bias", "embedding_sum", "embed_sum"):
                tensor.normal_(std=0.05, generator=generator)
    return model


@pytest.fixture(scope="module")
def loaders():
    return pytest.importorskip("moshi.models.loaders", reason="parity with moshi needs moshi")


@pytest.fixture(scope="module")
def make_pair(loaders, tmp_path_factory):
    """A function from the name of a configuration to moshi's model and ours, with the same weights."""

    def make(name):
        file, config = tmp_path_factory.mktemp(name) / "tokenizer.safetensors", CONFIGS[name]
        if config is None:
            save_kyutai(randomize(drop_in.get_mimi(None)).core, file)
            peer = loaders.get_mimi(file)
        else:
            torch.manual_seed(0)
            peer = randomize(loaders.get_mimi(None, config))
            save_file(peer.state_dict(), file)
        mine = drop_in.get_mimi(file, config)
        file.unlink()
        return peer.requires_grad_(False), mine.requires_grad_(False)

    return make


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name == "mimi" else ()) for name in CONFIGS]
)
def pair(request, make_pair):
    return make_pair(request.param)


@pytest.fixture(scope="module")
def model():
    """Our model, for tests that need no moshi."""
    return randomize(drop_in.get_mimi(None, CONFIGS["small"])).requires_grad_(False)


def in_chunks(function, x, size):
    return torch.cat([function(chunk) for chunk in x.split(size, dim=-1)], dim=-1)


# Offline


@pytest.mark.slow
@pytest.mark.parametrize("index", range(5))
def test_codes_and_audio(pair, index):
    peer, mine = pair
    samples = lengths(mine.frame_size)[index]
    batch = 2 if samples < 10_000 or mine.core.config.hidden_size < 100 else 1
    audio = noise(batch, mine.channels, samples, seed=index)
    latents = mine.encode_to_latent(audio, quantize=False)
    for count in (mine.core.config.num_semantic_quantizers, 8, mine.total_codebooks):
        peer.set_num_codebooks(count)
        mine.set_num_codebooks(count)
        assert mine.num_codebooks == peer.num_codebooks == count
        if samples < 10_000 or count == 8:  # long audio takes seconds, so with one count only
            theirs = peer.encode(audio)
            assert_same_codes(mine.encode(audio), theirs, latents, mine.core)
            assert relative_error(mine.decode(theirs), peer.decode(theirs)) < 1e-5


def test_latents(pair):
    peer, mine = pair
    audio = noise(2, mine.channels, 5 * mine.frame_size + 7)
    for quantize in (False, True):
        theirs = peer.encode_to_latent(audio, quantize=quantize)
        assert relative_error(mine.encode_to_latent(audio, quantize=quantize), theirs) < 1e-5
    codes = peer.encode(audio)
    assert relative_error(mine.decode_latent(codes), peer.decode_latent(codes)) < 1e-5


def test_properties_and_forward(pair):
    peer, mine = pair
    for name in ("channels", "frame_rate", "sample_rate", "frame_size", "total_codebooks", "cardinality"):
        assert getattr(mine, name) == getattr(peer, name), name
    audio = noise(2, mine.channels, 3 * mine.frame_size)
    for count in (mine.core.config.num_semantic_quantizers, 8):
        peer.set_num_codebooks(count)
        mine.set_num_codebooks(count)
        theirs, ours = peer(audio), mine(audio)
        assert vars(ours).keys() == vars(theirs).keys()
        assert torch.equal(ours.codes, theirs.codes)
        assert relative_error(ours.x, theirs.x) < 1e-5
        torch.testing.assert_close(ours.bandwidth, theirs.bandwidth)
        torch.testing.assert_close(ours.penalty, theirs.penalty)
        assert ours.metrics == theirs.metrics == {}


def test_constants_and_the_default_configuration(loaders):
    for name in ("SAMPLE_RATE", "FRAME_RATE", "MIMI_NAME", "DEFAULT_REPO"):
        assert getattr(drop_in, name) == getattr(loaders, name), name
    assert drop_in.codec_config(loaders._mimi_config) == drop_in.MimiCodecConfig()


# Streaming


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("small", 1), ("small", 2), ("small", 5), ("mimi", 1)])
def test_streams_equal_the_peers_up_to_10_s(make_pair, name, frames):
    peer, mine = make_pair(name)
    audio = noise(2, 1, (125 if name == "small" else 4) * mine.frame_size)
    with peer.streaming(2), mine.streaming(2):
        theirs = in_chunks(peer.encode, audio, frames * mine.frame_size)
        ours = in_chunks(mine.encode, audio, frames * mine.frame_size)
        assert torch.equal(ours, theirs)
        assert relative_error(in_chunks(mine.decode, theirs, frames), in_chunks(peer.decode, theirs, frames)) < 1e-5
    assert not mine.is_streaming
    assert torch.equal(ours, peer.encode(audio))


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 5])
def test_beyond_10_s_streams_equal_the_peer_offline(make_pair, frames):
    """moshi's own streams do not: its ring buffer overwrites keys that the first queries of a call still need."""
    peer, mine = make_pair("small")
    audio = noise(1, 1, 160 * mine.frame_size)
    codes = peer.encode(audio)
    whole = peer.decode(codes)
    with peer.streaming(1), mine.streaming(1):
        assert torch.equal(in_chunks(mine.encode, audio, frames * mine.frame_size), codes)
        assert relative_error(in_chunks(mine.decode, codes, frames), whole) < 1e-5
        theirs = in_chunks(peer.decode, codes, frames)
    edge = 125 * mine.frame_size
    assert relative_error(theirs[..., :edge], whole[..., :edge]) < 1e-5
    assert relative_error(theirs, whole) > 1e-4, "the peer's streams attend to 250 now: update compat/moshi.py"


@pytest.mark.slow
def test_masks_and_resets_equal_the_peers(make_pair):
    peer, mine = make_pair("small")
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(3, dtype=torch.bool)
    with peer.streaming(3), mine.streaming(3):
        for step in range(30):
            if step % 3 == 1:
                mask = torch.rand(3, generator=generator) < 0.6
                peer.set_exec_mask(mask)
                mine.set_exec_mask(mask)
            if step % 7 == 6:
                reset = torch.rand(3, generator=generator) < 0.4 if step != 20 else None  # None: all
                peer.reset_streaming(reset)
                mine.reset_streaming(reset)
                mask = mask | reset if reset is not None else torch.ones(3, dtype=torch.bool)
            audio = noise(3, 1, (1 + step % 2) * mine.frame_size, seed=step)
            theirs, ours = peer.encode(audio), mine.encode(audio)
            assert torch.equal(ours[mask], theirs[mask]), f"step {step}"
            assert not ours[~mask].any()
            theirs, ours = peer.decode(theirs), mine.decode(theirs)
            assert not mask.any() or relative_error(ours[mask], theirs[mask]) < 1e-5, f"step {step}"
            assert not ours[~mask].any()


def test_latents_and_forward_while_streaming(make_pair):
    peer, mine = make_pair("small")
    audio = noise(2, 1, 6 * mine.frame_size)
    for method in ("encode_to_latent", "forward"):
        with peer.streaming(2), mine.streaming(2):
            for chunk in audio.split(2 * mine.frame_size, dim=-1):
                theirs, ours = getattr(peer, method)(chunk), getattr(mine, method)(chunk)
                assert method != "forward" or torch.equal(ours.codes, theirs.codes)
                assert relative_error(getattr(ours, "x", ours), getattr(theirs, "x", theirs)) < 1e-5


def test_assert_same_codes_detects_a_wrong_code(model):
    audio = noise(1, 1, 9600)
    codes, latents = model.encode(audio), model.encode_to_latent(audio, quantize=False)
    other = torch.where(torch.arange(8)[:, None] == 3, 63 - codes, codes)
    with pytest.raises(AssertionError, match="level 2: not a tie"):  # of the acoustic quantizer
        assert_same_codes(codes, other, latents, model.core)


def test_chunks_of_any_length(model):
    audio = noise(2, 1, 7 * model.frame_size + 100)
    whole = model.encode(audio)
    with model.streaming(2):
        assert model.encode(audio[..., :100]).shape == (2, 8, 0)
        codes = [model.encode(chunk) for chunk in audio[..., 100:].split(777, dim=-1)]
        assert torch.equal(torch.cat([*codes, model.flush()], dim=-1), whole)
        assert model.flush().shape == (2, 8, 0)


def test_codes_of_rows_without_a_frame(model):
    """0, which can be embedded, for an inactive row; -1 for an active one that completes no frame where others do."""
    half = noise(3, 1, model.frame_size // 2)
    with model.streaming(3):
        model.set_exec_mask(torch.tensor([True, False, True]))
        model.encode(half)
        model.set_exec_mask(torch.tensor([True, True, False]))
        codes = model.encode(half)
    assert codes.shape == (3, 8, 1)
    assert (codes[0] >= 0).all() and (codes[1] == -1).all() and (codes[2] == 0).all()


def test_the_state_is_saved_and_restored_within_a_stream(make_pair):
    peer, mine = make_pair("small")
    audio = noise(2, 1, 9 * mine.frame_size)
    codes = peer.encode(audio)
    first, rest = audio.tensor_split([4 * mine.frame_size + 5], dim=-1)
    with mine.streaming(2):
        mine.encode(first)
        mine.decode(codes[..., :4])
        snapshot, same_snapshot = ({"": mine.get_streaming_state()[""].clone()} for _ in range(2))
        expected = mine.encode(rest), mine.decode(codes[..., 4:])
        assert torch.equal(expected[0], codes[..., 4:])
        assert relative_error(expected[1], peer.decode(codes)[..., first.shape[-1] - 5 :]) < 1e-5
        mine.set_streaming_state(snapshot)
        assert torch.equal(mine.encode(rest), expected[0])
    other = copy.deepcopy(mine)
    other.set_streaming_state(same_snapshot)  # a model that was not streaming continues the stream
    assert other.is_streaming and not mine.is_streaming
    assert torch.equal(other.encode(rest), expected[0]) and torch.equal(other.decode(codes[..., 4:]), expected[1])
    other.set_streaming_state({"": None})
    assert not other.is_streaming


def test_streaming_begins_with_the_call_and_ends_with_the_context(model):
    context = model.streaming(2)
    assert model.is_streaming and isinstance(model.get_streaming_state()[""], StreamState)
    with pytest.raises(RuntimeError, match="already streaming"):
        model.streaming(1)
    context.close()
    assert not model.is_streaming
    model = copy.deepcopy(model)
    model.streaming_forever(1)
    assert model.is_streaming


def test_state_dicts_checkpoints_and_casts(model, tmp_path):
    config = CONFIGS["small"]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.core.parameters())
    twin = drop_in.get_mimi(None, config)
    assert not torch.equal(twin.encode(noise(1, 1, 9600)), model.encode(noise(1, 1, 9600)))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.encode(noise(1, 1, 9600)), model.encode(noise(1, 1, 9600)))
    save_kyutai(model.core, tmp_path / "x.safetensors")
    back = drop_in.get_mimi(str(tmp_path / "x.safetensors"), config, num_codebooks=3)
    assert torch.equal(back.encode(noise(1, 1, 9600)), model.encode(noise(1, 1, 9600))[:, :3])
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.decode(half.encode(noise(1, 1, 1920))).dtype == torch.bfloat16


def test_forward_of_any_length_and_its_gradients(model):
    model = copy.deepcopy(model).requires_grad_(True)
    audio = noise(1, 1, 3000).requires_grad_(True)
    result = model(audio)
    assert result.x.shape == audio.shape and result.codes.shape == (1, 8, 2)
    assert torch.equal(result.codes, model.encode(audio))
    result.x.square().sum().backward()
    assert audio.grad.abs().max() > 0 and audio.grad.isfinite().all()
    assert model.core.encoder.layers["0"].conv.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_it_runs_without_moshi():
    code = (
        "import sys; sys.modules['moshi'] = None\n"
        "import torch; from fastmimi.compat import moshi\n"
        f"model = moshi.get_mimi(None, {CONFIGS['small']!r})\n"
        "result = model(torch.zeros(1, 1, 1920))\n"
        "assert result.codes.shape == (1, 8, 1) and result.penalty == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Errors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seanet": {"activation": "SiLU"}}, r"\['seanet'\]\['activation'\] must be 'ELU', got 'SiLU'"),
        ({"seanet": {"pad_mode": "reflect"}}, r"\['pad_mode'\] must be constant or replicate, got 'reflect'"),
        ({"seanet": {"final_activation": "Tanh"}}, r"not supported: final_activation"),
        ({"quantizer": {"input_dimension": 64}}, r"\['input_dimension'\] must be 32, got 64"),
        ({"quantizer": {"dimension": 32}}, r"\['dimension'\] must differ from seanet's, both are 32"),
        ({"transformer": {"d_model": 64}}, r"\['transformer'\]\['d_model'\] must be 32, got 64"),
        ({"transformer": {"positional_embedding": "sin"}}, r"\['positional_embedding'\] must be 'rope'"),
        ({"transformer": {"layer_scale": None}}, r"\['layer_scale'\] must be given"),
        ({"transformer": {"kv_repeat": 3}}, r"num_heads=4 must be divisible by kv_repeat=3"),
        ({"channels": 2}, r"mimi_config\['channels'\] must be 1, got 2"),
        ({"frame_rate": 10.0}, r"frame_rate must divide"),
    ],
)
def test_unsupported_configurations(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        drop_in.get_mimi(None, small(**changes))
    with pytest.raises(ValueError, match="mimi_config has no frame_rate, seanet"):
        drop_in.codec_config({"sample_rate": 24_000, "channels": 1, "quantizer": {}, "transformer": {}})


def test_invalid_files_and_numbers_of_codebooks(tmp_path, model):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.pt is not a \.safetensors file; pickled checkpoints can run code"):
        drop_in.get_mimi(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no model at"):
        drop_in.get_mimi(tmp_path / "y.safetensors")
    save_kyutai(model.core, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"96,151,393 parameters, and .*z\.safetensors holds 152,830"):
        drop_in.get_mimi(tmp_path / "z.safetensors")  # a small model with the default configuration
    with pytest.raises(ValueError, match="number of codebooks must be from 1 to 9, got 10"):
        drop_in.get_mimi(tmp_path / "z.safetensors", CONFIGS["small"], num_codebooks=10)
    with pytest.raises(ValueError, match="number of codebooks must be from 1 to 9, got 0"):
        model.set_num_codebooks(0)


def test_calls_without_a_stream_and_invalid_states(model):
    mask = torch.ones(1, dtype=torch.bool)
    for call in (model.reset_streaming, model.flush, lambda: model.set_exec_mask(mask)):
        with pytest.raises(RuntimeError, match="needs a streaming model"):
            call()
    with pytest.raises(RuntimeError, match=r"must have the single name '', got \['encoder'\]"):
        model.set_streaming_state({"encoder": None})
    with pytest.raises(ValueError, match="state must come from new_state"):
        model.set_streaming_state({"": 3})
    with pytest.raises(ValueError, match="make a new_state"):
        model.set_streaming_state({"": copy.deepcopy(model.core).double().new_state(1)})
    assert not model.is_streaming
    with model.streaming(2):
        with pytest.raises(ValueError, match=r"shape \(2,\), got \(1,\)"):
            model.set_exec_mask(mask)
        with pytest.raises(ValueError, match="the state is for 2 streams"):
            model.encode(noise(3, 1, 1920))
