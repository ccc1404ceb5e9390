"""The transformers drop-in against transformers with the same weights, field by field, and its intended differences."""

import copy
import inspect
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastmimi  # noqa: E402
from fastmimi.compat import transformers as drop_in  # noqa: E402
from fastmimi.devtools.testing import CONFIGS, SMALL, noise, relative_error  # noqa: E402

peer_module = transformers.models.mimi.modeling_mimi
HALVES = drop_in.HALVES
PAST, PAST_OF_HALF = "encoder_past_key_values", "past_key_values"
if PAST not in inspect.signature(transformers.MimiModel.encode).parameters:  # transformers >= 5.24
    PAST, PAST_OF_HALF = "encoder_cache", "cache"
DECODER_PAST = PAST.replace("en", "de", 1)
# transformers 4 attends to all earlier positions: compared within one window
WINDOW = {} if hasattr(peer_module, "create_sliding_window_causal_mask") else {"sliding_window": 1000}
NAMES = ["small", "ratios", "residual_layers", "attention", "replicate", "not_causal", "semantic"]
needs_halves = pytest.mark.skipif(not HALVES, reason="this transformers has no MimiEncoderModel")


def make_peer(name="small", **changes):
    torch.manual_seed(0)
    peer = transformers.MimiModel(transformers.MimiConfig(**{**CONFIGS[name], **WINDOW, **changes})).eval()
    for key, buffer in peer.named_buffers():
        if key.endswith("embed_sum"):
            buffer.normal_(std=0.3)
    return peer


def pair(name="small", **changes):
    peer = make_peer(name, **changes)
    mine = fastmimi.MimiModel(peer.config).eval()
    mine.load_state_dict(peer.state_dict())
    return mine, peer


@pytest.fixture(scope="module")
def models():
    return pair()


def assert_same_output(mine, theirs):
    """Assert that outputs, or tuples of them, have the same types and fields, equal codes, and floats within 1e-5."""
    if isinstance(theirs, torch.Tensor):
        assert mine.dtype == theirs.dtype
        if theirs.is_floating_point():
            assert relative_error(mine.detach(), theirs.detach()) < 1e-5
        else:
            assert torch.equal(mine, theirs)
    elif isinstance(theirs, transformers.cache_utils.Cache):
        assert mine.get_seq_length() == theirs.get_seq_length()
    elif hasattr(theirs, "items"):
        assert type(mine) is type(theirs) and list(mine.keys()) == list(theirs.keys())
        for key in theirs:
            assert_same_output(mine[key], theirs[key])
    elif isinstance(theirs, tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same_output(a, b)
    else:
        assert isinstance(theirs, peer_module.MimiConv1dPaddingCache | None) and isinstance(mine, type(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_output_fields(name):
    mine, peer = pair(name)
    for samples in (1, 1919, 1920, 1921, 30_000):
        audio = noise(2, 1, samples)
        codes = peer.encode(audio).audio_codes
        for return_dict in (None, True, False):
            options = {"return_dict": return_dict}
            assert_same_output(mine(audio, **options), peer(audio, **options))
            assert_same_output(
                mine.encode(audio, num_quantizers=3, **options), peer.encode(audio, num_quantizers=3, **options)
            )
            assert_same_output(mine.decode(codes, **options), peer.decode(codes, **options))
        assert_same_output(mine(audio, audio_codes=codes[:, :4]), peer(audio, audio_codes=codes[:, :4]))
        mask = torch.ones(2, 1, samples)
        assert_same_output(mine.decode(codes, mask), peer.decode(codes, mask))


@torch.no_grad()
def test_feature_extractor_inputs(models):
    mine, peer = models
    extractor = transformers.EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000)
    audio = [noise(3000, seed=1).numpy(), noise(3000, seed=2).numpy()]
    inputs = extractor(raw_audio=audio, sampling_rate=24_000, return_tensors="pt")
    assert_same_output(mine(**inputs), peer(**inputs))


@torch.no_grad()
def test_lengths_and_masks_of_codes(models):
    mine, peer = models
    lengths = torch.tensor([0, 1, 1919, 1920, 1921, 100_000])
    assert torch.equal(mine.get_encoded_length(lengths), peer.get_encoded_length(lengths))
    mask = torch.arange(5000) < torch.tensor([[5000], [10], [2000]])
    for side in ("right", "left"):
        assert torch.equal(mine.get_audio_codes_mask(mask, side), peer.get_audio_codes_mask(mask, side))


def stream(model, audio, sizes):
    past = cache = None
    codes = []
    for chunk in audio.split(sizes, dim=-1):
        out = model.encode(chunk, **{PAST: past}, padding_cache=cache, use_streaming=True)
        past, cache = getattr(out, PAST), out.padding_cache
        codes.append(out.audio_codes)
    return torch.cat(codes, dim=-1), past, cache


@pytest.mark.parametrize("name", ["small", "replicate"])
@torch.no_grad()
def test_streaming_with_caches(name):
    """With chunks of whole frames the codes equal the peer's; chunks of other lengths give the same codes."""
    mine, peer = pair(name, use_cache=True)  # without it, transformers 4 drops its cache even in a stream
    audio = noise(2, 1, 1920 * 30)
    theirs, their_past, _ = stream(peer, audio, [1920 * 3] * 10)
    codes, past, cache = stream(mine, audio, [1920 * 3] * 10)
    assert torch.equal(codes, theirs)
    assert past.get_seq_length() == their_past.get_seq_length()
    assert isinstance(cache, peer_module.MimiConv1dPaddingCache)
    partial_frames, _, _ = stream(mine, audio, [1000] * 57 + [600])
    assert torch.equal(partial_frames, theirs)
    assert torch.equal(mine.encode(audio).audio_codes, theirs)


@torch.no_grad()
def test_the_peers_own_padding_cache_is_accepted(models):
    """Larger models may create it (KyutaiSpeechToText has its own copy of the class)."""
    mine, peer = models
    audio = noise(1, 1, 1920 * 4)
    _, past, cache = stream(peer, audio, [1920 * 4])
    options = {PAST: past, "padding_cache": cache, "use_streaming": True}
    theirs = peer.encode(audio, **copy.deepcopy(options))
    assert_same_output(mine.encode(audio, **options).audio_codes, theirs.audio_codes)


@torch.no_grad()
def test_key_value_caches_of_the_decoder():
    mine, peer = pair(use_cache=True)
    codes = torch.randint(0, 64, (1, 6, 20), generator=torch.Generator().manual_seed(0))
    first = [model.decode(codes[..., :12]) for model in (mine, peer)]
    assert_same_output(*first)
    second = [m.decode(codes[..., 12:], **{DECODER_PAST: f[1]}) for m, f in zip((mine, peer), first, strict=True)]
    assert_same_output(*second)
    if HALVES:  # older versions of the peer's `forward` do not return the caches
        assert_same_output(mine(noise(1, 1, 4000)), peer(noise(1, 1, 4000)))


@needs_halves
@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_hidden_states_and_attentions(models, wanted):
    mine, peer = models
    if wanted == "output_attentions":
        for model in models:
            model.set_attn_implementation("eager")
    audio, options = noise(1, 1, 4000), {wanted: True}
    assert_same_output(mine.encode(audio, **options), peer.encode(audio, **options))
    codes = peer.encode(audio).audio_codes
    assert_same_output(mine.decode(codes, **options), peer.decode(codes, **options))


@needs_halves
@torch.no_grad()
def test_encoder_and_decoder_models(tmp_path):
    mine, peer = pair()
    audio, latents = noise(2, 1, 5000), noise(2, 32, 3)
    assert type(mine.encoder) is fastmimi.MimiEncoderModel and type(mine.decoder) is fastmimi.MimiDecoderModel
    assert_same_output(mine.encoder(audio), peer.encoder(audio))
    assert_same_output(mine.decoder(latents), peer.decoder(latents))
    assert_same_output(mine.encoder(audio, return_dict=False), peer.encoder(audio, return_dict=False))
    peer.save_pretrained(tmp_path)
    for ours, theirs, given in (
        (fastmimi.MimiEncoderModel, transformers.MimiEncoderModel, audio),
        (fastmimi.MimiDecoderModel, transformers.MimiDecoderModel, latents),
    ):
        a, b = ours.from_pretrained(tmp_path), theirs.from_pretrained(tmp_path)
        assert_same_output(a(given), b(given))
    mine = fastmimi.MimiEncoderModel.from_pretrained(tmp_path)
    streamed, past, cache = [], None, None
    for chunk in noise(1, 1, 1920 * 6).split(1000, dim=-1):
        out = mine(chunk, **{PAST_OF_HALF: past}, padding_cache=cache, use_streaming=True)
        past, cache = getattr(out, PAST_OF_HALF), out.padding_cache
        streamed.append(out.latents)
    assert relative_error(torch.cat(streamed, dim=-1), mine(noise(1, 1, 1920 * 6)).latents) < 1e-5
    encoder_only = fastmimi.MimiModel(transformers.MimiConfig(**SMALL, decoder_config=None))
    assert encoder_only.encode(audio).audio_codes.shape == (2, 6, 3)
    with pytest.raises(ValueError, match="without"):
        encoder_only.decode(torch.zeros(1, 6, 2, dtype=torch.int64))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_mask_is_respected(side):
    """The codes and audio of each row are identical to those of the unpadded row; the peer ignores the mask."""
    mine, peer = pair()
    lengths, total = [1, 1919, 4000, 9700], 9700
    audio, mask = torch.full((4, 1, total), 0.7), torch.zeros(4, total, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(total - length, total) if side == "left" else slice(0, length)
        audio[row, :, where], mask[row, where] = noise(1, length, seed=row), True
    out = mine(audio, padding_mask=mask)
    codes_mask = mine.get_audio_codes_mask(mask, side)
    for row in range(4):
        unpadded = peer(audio[row : row + 1, :, mask[row]])
        assert torch.equal(out.audio_codes[row, :, codes_mask[row]], unpadded.audio_codes[0])
        assert relative_error(out.audio_values[row, :, mask[row]], unpadded.audio_values[0]) < 1e-5
        assert (out.audio_codes[row, :, ~codes_mask[row]] == 0).all()
    with torch.enable_grad():
        again = mine(audio, padding_mask=mask[:, None])
    assert_same_output(again, out)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing):
    mine, peer = pair()
    mine.train()
    if checkpointing:
        mine.gradient_checkpointing_enable()
    out = mine(noise(1, 1, 4000))
    out.audio_values.square().mean().backward()
    assert not [name for name, p in mine.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    peer(noise(1, 1, 4000)).audio_values.square().mean().backward()
    reference = dict(peer.named_parameters())
    for name, parameter in mine.named_parameters():
        if "decoder_seanet" in name or name.startswith("decoder.layers"):
            assert relative_error(parameter.grad, reference[name].grad) < 1e-4, name


def test_save_and_load(tmp_path):
    mine, peer = pair()
    mine.save_pretrained(tmp_path / "mine")
    peer.save_pretrained(tmp_path / "peer")
    audio = noise(1, 1, 4000)
    with torch.no_grad():
        for cls in (fastmimi.MimiModel, transformers.MimiModel, transformers.AutoModel):
            for folder in ("mine", "peer"):
                again, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
                assert not info["missing_keys"] and not info["unexpected_keys"]
                assert_same_output(again(audio), peer(audio))
    assert torch.equal(
        fastmimi.load(tmp_path / "mine").encode(audio, last_frame="layers"), peer.encode(audio).audio_codes
    )
    fastmimi.save_pretrained(fastmimi.load(tmp_path / "peer"), tmp_path / "core")
    assert_same_output(transformers.MimiModel.from_pretrained(tmp_path / "core").encode(audio), peer.encode(audio))


def test_half_precision(tmp_path):
    mine, _ = pair()
    mine.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        half = fastmimi.MimiModel.from_pretrained(tmp_path, dtype=dtype)
        for model in (half, copy.deepcopy(mine).to(dtype)):
            assert model.dtype == dtype
            assert {b.dtype for n, b in model.named_buffers() if "codebook" in n} == {torch.float32}
            assert model(noise(1, 1, 4000).to(dtype)).audio_values.dtype == dtype


def test_auto_model():
    transformers.AutoModel.from_config(transformers.MimiConfig(**SMALL))
    mapping = copy.copy(transformers.AutoModel._model_mapping._extra_content)
    try:
        drop_in.register_auto_model()
        assert type(transformers.AutoModel.from_config(transformers.MimiConfig(**SMALL))) is fastmimi.MimiModel
    finally:
        transformers.AutoModel._model_mapping._extra_content = mapping


@torch.no_grad()
def test_edited_weights_and_replaced_modules_take_effect():
    mine, _ = pair()
    audio = noise(1, 1, 4000)
    mine(audio)
    other = make_peer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    mine.load_state_dict(other.state_dict())
    assert_same_output(mine(audio), other(audio))
    mine.quantizer = other.quantizer  # replaces a whole module
    for buffer in other.quantizer.buffers():
        buffer.mul_(1.5)
    assert_same_output(mine(audio), other(audio))
    assert_same_output(copy.deepcopy(mine)(audio), other(audio))
    assert_same_output(pickle.loads(pickle.dumps(mine))(audio), other(audio))


@torch.no_grad()
def test_subclasses_that_drop_parts():
    """The tokenizer of Qwen3-TTS keeps only the encoder."""

    class Tokenizer(fastmimi.MimiModel):
        def __init__(self, config):
            super().__init__(config)
            self.upsample = None
            self.decoder_transformer = None
            self.decoder = None

    peer = make_peer()
    mine = Tokenizer(peer.config).eval()
    mine.load_state_dict({k: v for k, v in peer.state_dict().items() if k in mine.state_dict()})
    assert not [name for name in mine.state_dict() if name.startswith(("decoder", "upsample"))]
    audio = noise(1, 1, 4000)
    assert_same_output(mine.encode(audio), peer.encode(audio))
    with pytest.raises(ValueError, match="without"):
        mine.decode(peer.encode(audio).audio_codes)


def test_weight_norm_that_is_not_folded():
    mine, peer = pair()
    for module in mine.modules():
        if hasattr(module, "apply_weight_norm"):
            module.apply_weight_norm()
    with torch.no_grad():
        assert_same_output(mine(noise(1, 1, 4000)), peer(noise(1, 1, 4000)))


def test_impl_is_passed_to_the_core(models):
    mine, _ = models
    mine.impl = "reference"
    assert {row.chosen for row in mine._core().explain()} == {"reference"}


def test_bad_input(models):
    mine, _ = models
    with pytest.raises(ValueError, match="got 7"):
        mine.encode(noise(1, 1, 100), num_quantizers=7)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="must be finite, got nan"):
            mine.encode(torch.full((1, 1, 100), float("nan")), use_streaming=streaming)
    with pytest.raises(ValueError, match=r"must lie in \[0, 64\), got 64"):
        mine.decode(torch.full((1, 6, 2), 64))
    with pytest.raises(ValueError, match="cannot stream"):
        fastmimi.MimiModel(transformers.MimiConfig(**CONFIGS["not_causal"])).encode(
            noise(1, 1, 100), use_streaming=True
        )
