"""The core API: shapes, dtypes, long audio, gradients, edited codebooks, and bad input."""

import copy
import io
import subprocess
import sys

import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import SMALL, noise, relative_error, short_tiles, small_model
from fastmimi.models.mimi import Mimi

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples


@pytest.fixture(scope="module")
def model():
    return small_model(**FAST)


def test_shapes(model):
    audio = noise(2, 1, 100)
    codes = model.encode(audio)
    assert codes.shape == (2, 6, 3) and codes.dtype == torch.int64
    assert model.encode(audio, num_codebooks=2).shape == (2, 2, 3)
    assert torch.equal(model.encode(audio, num_codebooks=2), codes[:, :2])
    assert model.decode(codes.int()).shape == model.decode(codes[:, :1]).shape == (2, 1, 144)
    assert model.encode_to_latent(audio).shape == (2, 32, 3)
    assert torch.equal(model.quantize(model.encode_to_latent(audio)), codes)
    assert relative_error(model.decode_latent(model.dequantize(codes)), model.decode(codes)) == 0
    assert model.encode(noise(1, 1, 0)).shape == (1, 6, 0)
    assert model.decode(codes[..., :0]).shape == (2, 1, 0)
    assert (model.sample_rate, model.frame_size, model.frame_rate) == (24_000, 48, 500.0)


def test_the_number_of_codebooks_can_be_set(model):
    mine = copy.deepcopy(model)
    mine.num_codebooks = 3
    assert mine.encode(noise(1, 1, 100)).shape[1] == 3 and mine.total_codebooks == 6
    with pytest.raises(ValueError, match="from 1 to 6, got 7"):
        mine.num_codebooks = 7


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_tiles_equal_one_pass(model, frames):
    audio = noise(2, 1, 48 * 60 + 5)
    codes = model.encode(audio)
    layers, decoded = model.encode(audio, last_frame="layers"), model.decode(codes)
    with short_tiles(model, 2, frames) as tiled:
        assert torch.equal(model.encode(audio), codes)
        assert torch.equal(model.encode(audio, last_frame="layers"), layers)
        assert relative_error(model.decode(codes), decoded) < 1e-5
    assert len(tiled) == 3


MEASURE_MEMORY = """
import resource, sys, torch, fastmimi
torch.set_num_threads(1)
samples = int(sys.argv[1]) * 24_000
mimi = fastmimi.load("random:0", num_codebooks=8)
audio = torch.randn(1, 1, 48_000).repeat(1, 1, 1 + samples // 48_000)[..., :samples]
mimi.decode(mimi.encode(audio[..., :48_000]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mimi.decode(mimi.encode(audio))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_bounded():
    """90 s add about 0.2 GB, the decoded audio and one tile; in one pass they would add 2.5 GB."""
    out = subprocess.run([sys.executable, "-c", MEASURE_MEMORY, "90"], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 300_000, f"{out.stdout.strip()} kB"


def test_gradients_reach_every_parameter(model):
    mine = copy.deepcopy(model).requires_grad_(True)
    audio = noise(1, 1, 480).requires_grad_(True)
    codes, latents = mine.straight_through(audio)
    assert torch.equal(codes, model.encode(audio.detach()))
    assert relative_error(latents.detach(), model.dequantize(codes)) < 1e-6
    mine.decode_latent(latents).square().mean().backward()
    assert audio.grad.abs().sum() > 0
    assert not [name for name, p in mine.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_gradients_of_long_audio_equal_those_of_one_pass(model):
    """Tiles write state in place, so that audio is not tiled where gradients are recorded."""
    mine, one_pass = (copy.deepcopy(model).requires_grad_(True) for _ in range(2))
    one_pass.encode_to_latent(noise(1, 1, 480)).sum().backward()
    with short_tiles(mine, 1, 1) as tiled:
        mine.encode_to_latent(noise(1, 1, 480)).sum().backward()
        assert not tiled
        with torch.no_grad():
            mine.encode_to_latent(noise(1, 1, 480))
        assert tiled == [480], "without gradients it is long enough for tiles"
    for p, q in zip(mine.encoder.parameters(), one_pass.encoder.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codebooks_stay_in_fp32_or_fp64(model, dtype):
    mine = copy.deepcopy(model).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    quantizer = mine.quantizer.acoustic_residual_vector_quantizer
    assert quantizer.codebooks().dtype == wide
    assert torch.equal(quantizer.codebooks().float(), model.quantizer.acoustic_residual_vector_quantizer.codebooks())
    audio = mine.decode(mine.encode(noise(1, 1, 480).to(dtype)))
    assert audio.dtype == dtype and audio.isfinite().all()
    state = mine.new_state(1)
    assert mine.decode(mine.encode(noise(1, 1, 480), state=state), state=state).dtype == dtype


def test_audio_in_bf16_is_close_to_fp32():
    model = small_model()
    audio = noise(1, 1, 24_000)
    codes, mine = model.encode(audio), copy.deepcopy(model).bfloat16()
    assert relative_error(mine.decode(codes).float(), model.decode(codes)) < 0.02  # 0.010 was seen


def _edit_in_place(model, other):
    with torch.no_grad():
        for codebook, theirs in zip(_codebooks(model), _codebooks(other), strict=True):
            codebook.embed_sum.copy_(theirs.embed_sum)


def _edit_usage(model, other):
    with torch.no_grad():
        for codebook, theirs in zip(_codebooks(model), _codebooks(other), strict=True):
            codebook.embed_sum.copy_(theirs.embed_sum * 2)
            codebook.cluster_usage.mul_(2)


def _replace(model, other):
    for codebook, theirs in zip(_codebooks(model), _codebooks(other), strict=True):
        codebook.embed_sum = theirs.embed_sum.clone()


def _codebooks(model):
    return [m for m in model.modules() if hasattr(m, "embed_sum")]


@pytest.mark.parametrize(
    "change",
    [
        lambda model, other: model.load_state_dict(other.state_dict()),
        lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
        _edit_in_place,
        _edit_usage,
        _replace,
    ],
)
def test_codebooks_never_go_stale(model, change):
    mine, other = copy.deepcopy(model), small_model(seed=1, **FAST)
    codes = torch.randint(0, 64, (1, 6, 9), generator=torch.Generator().manual_seed(0))
    mine.dequantize(codes)  # fills the cache
    change(mine, other)
    fresh = Mimi(mine.config).requires_grad_(False)
    fresh.load_state_dict(mine.state_dict())
    assert torch.equal(mine.dequantize(codes), fresh.dequantize(codes))
    assert not torch.equal(mine.dequantize(codes), model.dequantize(codes))


def test_models_can_be_pickled(model):
    model.dequantize(torch.zeros(1, 6, 1, dtype=torch.int64))  # fills the cache
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again.encode(noise(1, 1, 480)), model.encode(noise(1, 1, 480)))


def test_weight_norm_parametrizations(model):
    mine = copy.deepcopy(model).requires_grad_(True)
    for module in mine.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d) and module.weight.dim() == 3:
            torch.nn.utils.parametrizations.weight_norm(module)
    audio = noise(1, 1, 480)
    assert relative_error(mine.encode_to_latent(audio).detach(), model.encode_to_latent(audio)) < 1e-5
    with torch.no_grad():
        mine.encoder.layers["0"].conv.parametrizations.weight.original0.mul_(2)
    assert relative_error(mine.encode_to_latent(audio).detach(), model.encode_to_latent(audio)) > 1e-3
    _, latents = mine.straight_through(audio)
    mine.decode_latent(latents).sum().backward()
    assert mine.encoder.layers["0"].conv.parametrizations.weight.original1.grad is not None


def test_only_an_encoder_or_a_decoder():
    encoder = Mimi(fastmimi.MimiCodecConfig.from_dict({**SMALL, **FAST, "decoder_config": None}))
    decoder = Mimi(fastmimi.MimiCodecConfig.from_dict({**SMALL, **FAST, "encoder_config": None}))
    codes = encoder.encode(noise(1, 1, 480))
    assert decoder.decode(codes).shape == (1, 1, 480)
    with pytest.raises(ValueError, match="decode needs the decoder"):
        encoder.decode(codes)
    with pytest.raises(ValueError, match="encode needs the encoder"):
        decoder.encode(noise(1, 1, 480))
    encoder.encode(noise(1, 1, 10), state=encoder.new_state(1))
    decoder.decode(codes, state=decoder.new_state(1))


def test_gradient_checkpointing_gives_the_same_gradients(model):
    plain = copy.deepcopy(model).requires_grad_(True).train()
    recomputed = copy.deepcopy(plain)
    recomputed.encoder_transformer.gradient_checkpointing = True
    for mine in (plain, recomputed):
        mine.encode_to_latent(noise(1, 1, 480)).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad), name


def test_attention_dropout_only_in_training():
    model = small_model(attention_dropout=0.5, **FAST)
    audio = noise(1, 1, 480)
    assert torch.equal(model.encode_to_latent(audio), model.encode_to_latent(audio))
    model.train()
    for module in model.modules():
        if hasattr(module, "scale"):
            module.scale.fill_(1.0)
    assert not torch.equal(model.encode_to_latent(audio), model.encode_to_latent(audio))


@pytest.mark.parametrize(
    "audio, sentence",
    [
        (torch.zeros(2, 80), r"audio must be \[batch, 1, samples\], got \(2, 80\)"),
        (torch.zeros(1, 2, 80), r"audio must be \[batch, 1, samples\], got \(1, 2, 80\)"),
        (torch.zeros(0, 1, 80), r"got \(0, 1, 80\)"),
        (torch.zeros(1, 1, 80, dtype=torch.int16), r"floating point in \[-1, 1\], got torch.int16"),
        ([0.0], "must be a torch.Tensor, got list"),
        (torch.tensor([[[0.0, float("nan")]]]), r"audio must be finite, got nan at \[0, 0, 1\]"),
        (torch.tensor([[[0.0, float("-inf")]]]), r"audio must be finite, got -inf at \[0, 0, 1\]"),
    ],
)
def test_bad_audio(model, audio, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.encode(audio)
    state = model.new_state(1)
    before = state.clone().state_dict()
    with pytest.raises(ValueError, match=sentence):
        model.encode(audio, state=state)
    assert all(torch.equal(t, before[name]) for name, t in state.state_dict().items())


@pytest.mark.parametrize(
    "codes, sentence",
    [
        (torch.zeros(6, 2, dtype=torch.int64), r"codes must be \[batch, codebooks, frames\], got \(6, 2\)"),
        (torch.zeros(1, 6, 2), "codes must be integers, got torch.float32"),
        (torch.zeros(1, 7, 2, dtype=torch.int64), "number of codebooks must be from 1 to 6, got 7"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), "number of codebooks must be from 1 to 6, got 0"),
        (torch.full((1, 6, 2), 64), r"codes must lie in \[0, 64\), got 64"),
        (torch.full((1, 6, 2), -5), r"codes must lie in \[0, 64\), got -5"),
        ("codes", "codes must be a torch.Tensor, got str"),
    ],
)
def test_bad_codes(model, codes, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.decode(codes)


def test_other_bad_arguments(model):
    audio = noise(1, 1, 100)
    for count in (0, 7, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to 6, got {count}"):
            model.encode(audio, num_codebooks=count)
    with pytest.raises(ValueError, match="last_frame must be 'waveform' or 'layers', got 'drop'"):
        model.encode(audio, last_frame="drop")
    with pytest.raises(ValueError, match="latents must be floating point"):
        model.decode_latent(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"state must come from new_state\(\), got dict"):
        model.encode(audio, state={})


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_semantic_quantizers": 6}, "num_semantic_quantizers must be below num_quantizers"),
        ({"pad_mode": "circular"}, "pad_mode must be .*'circular'"),
        ({"use_causal_conv": False, "trim_right_ratio": 0.5}, "trim_right_ratio"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"frame_rate": 9.0}, "frame_rate must divide"),
        ({"frame_rate": -1.0}, "frame_rate must be greater than or equal to 0, got -1.0"),
        ({"num_quantizers": "x"}, "num_quantizers must be a valid integer, got 'x'"),
        ({"hidden_size": -3}, "hidden_size must be greater than or equal to 1, got -3"),
        ({"hidden_size": 33}, r"hidden_size \(33\) must be a multiple of num_attention_heads \(4\)"),
        ({"head_dim": 7}, "head_dim even, got 7"),
        ({"num_attention_heads": 0}, "num_attention_heads must be greater than or equal to 1, got 0"),
        ({"sampling_rate": 0}, "sampling_rate must be greater than or equal to 1, got 0"),
        ({"codebook_size": None}, "codebook_size must be a valid integer, got None"),
        ({"codebook_dim": 8}, r"codebook_dim must equal vector_quantization_hidden_dimension \(16\), got 8"),
        ({"upsampling_ratios": [4, 0]}, r"upsampling_ratios.1 must be greater than or equal to 1, got 0"),
        ({"upsample_groups": 5}, r"upsample_groups must divide hidden_size \(32\), got 5"),
        ({"encoder_config": None, "decoder_config": None}, "both were dropped"),
        ({"hidden_act": "sine"}, "hidden_act must be one of"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "no chunking equals"),
    ],
)
def test_bad_configurations(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mimi(fastmimi.MimiCodecConfig.from_dict({**SMALL, **change}))
