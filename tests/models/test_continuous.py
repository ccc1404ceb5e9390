"""Mimi with continuous latents: chunking, equal results of all backends, checkpoints, and what it does not have."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import fastmimi
from fastmimi import ContinuousMimi, ContinuousMimiConfig, InputError
from fastmimi.checkpoints import shapes, weights
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.models.continuous import pocket_half
from fastmimi.runtime import packing

FRAME = 1920
BACKENDS = ["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)]
TO_POCKET = (  # flat names -> those of Pocket TTS
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"^decoder\.model\.(2|5|8)\.conv\.", r"decoder.model.\1.convtr."),
    (r"^downsample\.conv\.", "downsample.conv.conv."),
    (r"^upsample\.conv\.", "upsample.convtr.convtr."),
    (r"^projection\.conv\.", "quantizer.output_proj."),
    (r"_transformer\.layers\.", "_transformer.transformer.layers."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.mlp\.fc(1|2)\.", r".linear\1."),
    (r"\.self_attn_layer_scale\.", ".layer_scale_1."),
    (r"\.mlp_layer_scale\.", ".layer_scale_2."),
)


def small(seed=0, **changes):
    return weights.random(ContinuousMimiConfig.small(**changes), seed).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return small()


def as_in_pocket_tts(codec):
    """The state dict of a codec under the names of Pocket TTS, its projections fused, with its order of their rows."""
    state, fused = {}, {}
    for name, tensor in codec.state_dict().items():
        if name.endswith("_proj.weight") and ".self_attn." in name and not name.endswith("o_proj.weight"):
            half = getattr(codec.config, name.partition("_")[0])
            if not name.endswith("v_proj.weight"):  # from (i, i + D / 2) to (2 i, 2 i + 1)
                heads = tensor.view(half.num_attention_heads, 2, half.head_dim // 2, -1)
                tensor = torch.stack([heads[:, 0], heads[:, 1]], dim=2).view(tensor.shape)
            fused.setdefault(name[: -len("q_proj.weight")] + "in_proj.weight", []).append(tensor)
        else:
            state[name] = tensor
    state |= {name: torch.cat(rows) for name, rows in fused.items()}
    for pattern, replacement in TO_POCKET:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("config", [ContinuousMimiConfig(), ContinuousMimiConfig.small()], ids=["default", "small"])
def test_the_number_of_parameters(config):
    with torch.device("meta"):
        codec = ContinuousMimi(config)
    assert sum(tensor.numel() for tensor in codec.state_dict().values()) == config.num_parameters


@pytest.mark.parametrize("impl", BACKENDS)
def test_any_chunking_equals_the_whole(model, impl):
    model.impl = impl
    audio, latents = noise(2, 1, 3 * FRAME + 100), noise(2, 4, 8, scale=1.0).mT  # 64 positions, beyond both windows
    encoded, decoded = model.encode_to_latent(audio), model.decode_latent(latents)
    assert encoded.shape == (2, 6, 4) and decoded.shape == (2, 1, 4 * FRAME)
    state = model.new_state(2)
    chunks = [model.encode_to_latent(chunk, state=state) for chunk in audio.split(2500, dim=-1)]
    assert relative_error(torch.cat(chunks, dim=-1), encoded[..., :3]) < 1e-5
    chunks = [model.decode_latent(chunk, state=state) for chunk in latents.split([1, 1, 2], dim=-1)]
    assert relative_error(torch.cat(chunks, dim=-1), decoded) < 1e-5


@pytest.mark.parametrize("impl", BACKENDS[1:])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": pocket_half(hidden_size=32, num_filters=4, upsample_groups=32, num_attention_heads=4,
                                num_key_value_heads=4, intermediate_size=40, pad_mode="replicate")},
        {"encoded_size": 40, "latent_size": 1},
    ],
    ids=["small", "equal widths, replicate", "sizes"],
)  # fmt: skip
def test_backends_agree_with_the_reference(changes, impl):
    model, audio = small(**changes), noise(1, 1, 2 * FRAME + 1)
    latents = noise(1, model.config.latent_size, 3, scale=1.0)
    results = []
    for model.impl in (impl, "reference"):
        results.append((model.encode_to_latent(audio), model.decode_latent(latents)))
    for mine, reference in zip(*results, strict=True):
        assert relative_error(mine, reference) < 1e-5


def test_long_audio_runs_in_tiles(model):
    model.impl = "auto"
    audio = noise(1, 1, 300 * FRAME)  # more than a tile
    halves = audio.split(150 * FRAME, dim=-1)
    state = model.new_state(1)
    parts = [model.encode_to_latent(half, state=state) for half in halves]
    assert relative_error(torch.cat(parts, dim=-1), model.encode_to_latent(audio)) < 1e-5


def test_rows_of_a_ragged_batch_are_as_alone(model):
    audio = noise(2, 1, 4 * FRAME)
    mask = torch.arange(4 * FRAME) < torch.tensor([[4 * FRAME], [2 * FRAME - 7]])
    latents = model.encode_to_latent(audio, padding_mask=mask)
    alone = model.encode_to_latent(audio[1:, :, : 2 * FRAME - 7])
    assert relative_error(latents[1:, :, :2], alone) < 1e-5 and not latents[1, :, 2:].any()


def test_recorded_steps_equal_the_model(model):
    model.impl = "auto"
    latents, states = noise(1, 6, 8, scale=1.0).mT, [model.new_state(1), model.new_state(1)]
    model.warm_up(states[1], latents=True)
    prepared = packing.preparations()
    chunks = [[model.decode_latent(x, state=state) for x in latents.split(1, dim=-1)] for state in states]
    assert packing.preparations() == prepared
    assert relative_error(torch.cat(chunks[1], dim=-1), model.decode_latent(latents)) < 1e-5
    assert all(map(torch.equal, *chunks))


def test_gradients_reach_both_halves():
    model = small().train().requires_grad_(True)
    latents = model.encode_to_latent(noise(1, 1, 3 * FRAME))
    model.decode_latent(latents[:, :1].expand(-1, 8, -1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Configurations and checkpoints


def test_configurations_survive_json():
    config = ContinuousMimiConfig.small(encoded_size=5)
    values = json.loads(json.dumps(config.to_dict()))
    assert ContinuousMimiConfig.from_dict({**values, "unknown": 1}) == config
    assert {"codebook_size", "has_decoder"}.isdisjoint(values["decoder"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"encoder": pocket_half(sampling_rate=48_000, frame_rate=25.0)},
            "the same sampling_rate, got 48000 and 24000",
        ),
        ({"encoder": pocket_half(audio_channels=2)}, "the same audio_channels, got 2 and 1"),
        ({"encoder": pocket_half(upsampling_ratios=[6, 5, 8])}, "the same hop_length, got 240 and 120"),
        ({"decoder": pocket_half(frame_rate=25.0)}, "the same frame_rate, got 12.5 and 25.0"),
        ({"encoded_size": 0}, "encoded_size must be greater than or equal to 1, got 0"),
        ({"latent_size": "8"}, "latent_size must be a valid integer, got '8'"),
        ({"encoder": 3}, "encoder must be an instance of MimiCodecConfig, got 3"),
        (
            {"encoder": pocket_half(frame_rate=200.0), "decoder": pocket_half(frame_rate=200.0)},
            r"encoded_size must be the encoder's hidden_size \(512\) where nothing is resampled, got 32",
        ),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        ContinuousMimiConfig(**changes)


def test_checkpoints_under_our_names(model, tmp_path):
    fastmimi.save_pretrained(model, tmp_path)
    loaded = fastmimi.load(tmp_path)
    latents = noise(1, 8, 3)
    assert type(loaded) is ContinuousMimi and loaded.config == model.config
    assert torch.equal(loaded.decode_latent(latents), small().decode_latent(latents))


@pytest.mark.parametrize("prefix", ["", "mimi."])
def test_checkpoints_under_the_names_of_pocket_tts(model, tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in as_in_pocket_tts(model).items()}
    others = {"flow_lm.bos_emb": torch.zeros(1)} if prefix else {}
    save_file({**state, **others}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    loaded = fastmimi.load(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("decoder", [
    {}, {"hidden_size": 128, "upsample_groups": 128, "num_filters": 24, "kernel_size": 3, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 50, "intermediate_size": 384},
], ids=["as the encoder", "narrow"])  # fmt: skip
def test_published_configurations_are_inferred_from_shapes(decoder):
    config = ContinuousMimiConfig(decoder=pocket_half(**decoder), encoded_size=512)
    with torch.device("meta"):
        state = as_in_pocket_tts(ContinuousMimi(config))
    assert shapes.infer_config(state) == config


def test_other_configurations_need_a_file(model):
    with pytest.raises(InputError, match=r"without a config.json, the encoder must be 512 or 128 wide, .*, got 32"):
        shapes.infer_config(as_in_pocket_tts(model))


def test_a_tensor_that_does_not_fit(model, tmp_path):
    state = as_in_pocket_tts(model)
    state["quantizer.output_proj.weight"] = torch.zeros(24, 9, 1)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(InputError, match=r"projection.conv.weight must be \(24, 8, 1\), got \(24, 9, 1\)"):
        fastmimi.load(tmp_path)


@pytest.mark.slow
def test_random_weights_by_name():
    assert isinstance(codec := fastmimi.load("continuous-random:1"), ContinuousMimi)
    assert codec.config == ContinuousMimiConfig() and codec.frame_size == FRAME and codec.frame_rate == 12.5


# What it has not


@pytest.mark.parametrize(
    "call",
    [
        lambda codec: codec.encode(noise(1, 1, FRAME)),
        lambda codec: codec.decode(torch.zeros(1, 8, 1, dtype=torch.long)),
        lambda codec: codec.decode(torch.zeros(1, 0, 1, dtype=torch.long)),
        lambda codec: codec.quantize(noise(1, 8, 2)),
        lambda codec: codec.dequantize(torch.zeros(1, 8, 1, dtype=torch.long)),
        lambda codec: codec.flush(codec.new_state(1)),
        lambda codec: codec.warm_up(codec.new_state(1)),
        lambda codec: setattr(codec, "num_codebooks", 8),
        lambda codec: fastmimi.SlotPool(codec, 2),
        weights.fingerprint,
    ],
)
def test_what_needs_codes(model, call):
    with pytest.raises(InputError, match="continuous latents and no codes"):
        call(model)


def test_kyutais_other_layout_and_training_are_for_codes(model, tmp_path):
    with pytest.raises(InputError, match="only a Mimi can be saved in Kyutai's layout, got a ContinuousMimi"):
        fastmimi.save_kyutai(model, tmp_path / "x.safetensors")


def test_latents_of_another_size(model):
    with pytest.raises(InputError, match=r"latents must be floating point \[batch, 8, frames\], got .* \(1, 6, 3\)"):
        model.decode_latent(noise(1, 6, 3))
