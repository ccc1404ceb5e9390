"""Configurations are validated before anything is built; errors name the field and its value."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmimi
from fastmimi import InputError, JodioConfig, JodioModel, Mimi, MimiCodecConfig
from fastmimi.devtools.testing import CONFIGS, SMALL, noise, small_model
from fastmimi.models.config import JodioTransformerConfig
from fastmimi.models.validation import ROPES, read_json

LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"hidden_size": "8"}, "hidden_size must be a valid integer, got '8'"),
        ({"hidden_size": True}, "hidden_size must be a valid integer, got True"),
        ({"hidden_size": 32.0}, "hidden_size must be a valid integer, got 32.0"),
        ({"head_dim": False}, "head_dim must be a valid integer, got False"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be less than or equal to 1024, got 2147483648"),
        ({"sliding_window": 10**5000}, "sliding_window must be .*, got an integer of 16610 bits"),
        ({"norm_eps": 10**400}, "norm_eps must be a valid number, got an integer of 1329 bits"),
        ({"norm_eps": math.nan}, "norm_eps must be a finite number, got nan"),
        ({"norm_eps": True}, "norm_eps must be a valid number, got True"),
        ({"layer_scale_initial_scale": -math.inf}, "layer_scale_initial_scale must be a finite number, got -inf"),
        ({"attention_dropout": 1.0}, "attention_dropout must be less than 1, got 1.0"),
        ({"use_causal_conv": "no"}, "use_causal_conv must be a valid boolean, got 'no'"),
        ({"upsampling_ratios": 8}, "upsampling_ratios must be a valid list, got 8"),
        ({"upsampling_ratios": [8, "6"]}, r"upsampling_ratios\.1 must be a valid integer, got '6'"),
        ({"upsampling_ratios": [2] * 17}, "upsampling_ratios must have at most 16 items .*, got"),
        ({"pad_mode": ["constant"]}, r"pad_mode must be 'constant', 'replicate' or 'reflect', got \['constant'\]"),
        ({"hidden_act": 7}, "hidden_act must be a valid string, got 7"),
        ({"frame_rate": 5e-324}, "frame_rate must divide .*, got 5e-324"),
        ({"compress": 5}, r"compress must be at most num_filters \(4\), got 5"),
        ({"num_residual_layers": 40}, "num_residual_layers .* must reach no further back than 65536 samples, got 40"),
        ({"rope_parameters": [1]}, r"rope_parameters must be a valid dictionary, got \[1\]"),
        ({"rope_parameters": {"rope_type": ["x"]}}, r"rope_type must be one of default, .*, got \['x'\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.factor must be given"),
        ({"rope_parameters": {**LINEAR, "factor": math.inf}}, r"\.factor must be a finite number, got inf"),
        ({"rope_parameters": {"rope_theta": -1.0}}, r"rope_parameters\.rope_theta must be greater than 0, got -1.0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, r"rope_parameters\.rope_theta must be a valid number, got '1e4'"),
        (
            {"rope_parameters": {**LLAMA, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"low_freq_factor must be below high_freq_factor \(4.0\), got 4.0",
        ),
        ({"rope_theta": 1e4, "rope_scaling": [2.0]}, r"rope_scaling must be a dictionary, got \[2.0\]"),
    ],
)  # fmt: skip
def test_the_error_names_the_field_and_its_value(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        MimiCodecConfig.from_dict({**SMALL, **change})


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"channels": "8"}, "channels must be a valid integer, got '8'"),
        ({"dropout": math.nan}, "dropout must be a finite number, got nan"),
        ({"encoder_transformer": 3}, "encoder_transformer must be an instance of JodioTransformerConfig, got 3"),
        ({"decoder_transformer": {"hidden_size": None}}, "decoder_transformer: hidden_size must be .*, got None"),
        ({"dilations": [1024], "kernel_size": 1024}, "dilations must reach no further back than 65536 samples"),
        ({"channels": 65536, "kernel_size": 1024}, "at most 4,294,967,296 parameters, got"),
    ],
)
def test_the_error_names_the_field_and_its_value_for_jodio(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        JodioConfig.from_dict(values)


@pytest.mark.parametrize("values", [None, 3, "{}", [("hidden_size", 8)]])
@pytest.mark.parametrize("kind", [MimiCodecConfig, JodioConfig])
def test_a_configuration_must_be_a_dictionary(kind: type, values: Any) -> None:
    with pytest.raises(InputError, match="a configuration must be a dictionary of its fields, got"):
        kind.from_dict(values)


def test_null_fields_are_derived_as_in_transformers() -> None:
    nulls = {
        "codebook_dim": None,
        "head_dim": None,
        "upsampling_ratios": None,
        "frame_rate": None,
        "rope_parameters": None,
    }
    config = MimiCodecConfig.from_dict({**nulls, "vector_quantization_hidden_dimension": 512, "unknown": object()})
    assert (config.codebook_dim, config.head_dim, config.frame_rate) == (512, 64, 12.5)
    assert config.upsampling_ratios == [8, 6, 5, 4]
    assert MimiCodecConfig(upsampling_ratios=(8, 6, 5, 4)) == MimiCodecConfig()  # type: ignore[arg-type]
    assert MimiCodecConfig(norm_eps=0, trim_right_ratio=1) == MimiCodecConfig(norm_eps=0.0)
    scales = [p for name, p in small_model(layer_scale_initial_scale=0).named_parameters() if name.endswith("scale")]
    assert {p.dtype for p in scales} == {torch.float32}


def test_configurations_are_plain_dataclasses() -> None:
    for config in (MimiCodecConfig(), JodioConfig.small(), JodioTransformerConfig()):
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
        assert type(config)(**vars(config)) == config
    assert dataclasses.asdict(MimiCodecConfig())["hidden_size"] == 512
    with pytest.raises(InputError, match="hidden_size must be greater"):
        dataclasses.replace(MimiCodecConfig(), hidden_size=0)


@pytest.mark.parametrize("kind", sorted(ROPES))
def test_every_accepted_rope_type_can_be_built(kind: str) -> None:
    values = {**LLAMA, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": kind}
    import transformers.modeling_rope_utils as peer

    if kind not in ("default", *peer.ROPE_INIT_FUNCTIONS):
        pytest.skip(f"transformers has no {kind} yet")
    frequencies = Mimi(MimiCodecConfig.from_dict({**SMALL, "rope_parameters": values})).encoder_transformer._inv_freq
    assert frequencies.shape == (4,) and frequencies.isfinite().all()


# Sizes


def number_of_elements(model: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("halves", [{}, {"has_encoder": False}, {"has_decoder": False}])
def test_parameters_are_counted_without_building(name: str, halves: dict[str, bool]) -> None:
    config = MimiCodecConfig.from_dict({**CONFIGS[name], **halves})
    with torch.device("meta"):
        assert number_of_elements(Mimi(config)) == config.num_parameters
        config = dataclasses.replace(config, frame_rate=config.encodec_frame_rate)  # without resampling
        assert number_of_elements(Mimi(config)) == config.num_parameters


@pytest.mark.parametrize("config", [JodioConfig(), JodioConfig.small(dilations=[1], strides=[2, 3], audio_channels=2)])
def test_parameters_of_a_jodio_are_counted_without_building(config: JodioConfig) -> None:
    with torch.device("meta"):
        assert number_of_elements(JodioModel(config)) == config.num_parameters


def test_a_codec_without_residual_units() -> None:
    model = small_model(num_residual_layers=0)
    assert number_of_elements(model) == model.config.num_parameters
    codes = model.encode(noise(1, 1, 5000))
    state = model.new_state()
    streamed = [model.encode(chunk, state=state) for chunk in noise(1, 1, 5000).split(700, dim=-1)]
    assert torch.equal(torch.cat([*streamed, model.flush(state)], dim=-1), codes)
    assert model.decode(codes).isfinite().all()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1000}, {"num_filters": 256}, {"intermediate_size": 60_000}])
def test_a_model_of_another_size_than_its_file_is_not_built(
    tmp_path: Path, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    fastmimi.save_pretrained(model, tmp_path)
    values = {**model.config.to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(fastmimi.checkpoints.weights, "Mimi", None)  # must not be called
    described, held = MimiCodecConfig.from_dict(values).num_parameters, model.config.num_parameters
    with pytest.raises(InputError, match=f"a model of {described:,} parameters, and .* holds {held:,}"):
        fastmimi.load(tmp_path)


# Files


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON|got an integer of"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"3", "must hold a JSON object, got int"),
        (b" " * 10_000_001, "must hold at most 10,000,000 bytes of JSON, got 10,000,001"),
        (b'{"model_type": ["mimi"]}', r"describes a \['mimi'\] model, not Mimi"),
        (b'{"norm_eps": NaN}', r"config\.json: norm_eps must be a finite number, got nan"),
    ],
)
def test_invalid_configuration_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        MimiCodecConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("path", [None, 3, b"config.json"])
def test_invalid_paths(path: Any) -> None:
    with pytest.raises(InputError, match="the path of a JSON file must be a str or a Path, got"):
        read_json(path)
