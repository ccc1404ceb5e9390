"""Invalid arguments: every public function raises an InputError of one line. Masks may be lists and arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmimi
from fastmimi import InputError, JodioConfig, JodioModel, Mimi
from fastmimi.checkpoints.weights import fingerprint, random
from fastmimi.compat import moshi as moshi_drop_in
from fastmimi.devtools.testing import noise, small_model
from fastmimi.io import audio, tokens

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples
MODEL = small_model(**FAST)
AUDIO, CODES, LATENTS = noise(2, 1, 100), torch.zeros(2, 6, 3, dtype=torch.long), noise(2, 32, 3)
TOKENS = tokens.Tokens(CODES[0].numpy(), 64, 24_000, 500.0, 48, 144, "f", "m")
NAN = float("nan")
ANYTHING: list[Any] = [None, 3, 1.5, "m", b"m", [], {}, object(), True, np.zeros(2), [[1], [2, 3]], 1j]
BAD_TENSORS: list[Any] = [
    torch.zeros(2, 1, 100, device="meta"),
    torch.zeros(2, 1, 100, dtype=torch.complex64),
    torch.zeros(2, 1, 100, dtype=torch.bool),
    torch.zeros(2, 6, 3, device="meta", dtype=torch.long),
    torch.zeros(2, 6, 3).to_sparse(),
    torch.zeros(2, 32, 3, device="meta"),
    torch.zeros(()),
    torch.zeros(0, 1, 100),
]
BAD_COUNTS: list[Any] = [True, 1.5, 8.0, "8", float("nan"), float("inf"), 10**30, -1, [8], b"8", torch.tensor(8), 1j]
BAD_NAMES: list[Any] = [
    "nonsense",
    "",
    3,
    1.5,
    True,
    b"cpu",
    ["cpu"],
    {},
    object(),
    np.zeros(2),
    torch.zeros(2),
    "x" * 5000,
]


def without(values: list[Any], *allowed: Any) -> list[Any]:
    """The values without those that are valid for this argument."""
    return [value for value in values if not any(value is other for other in allowed)]


def state() -> fastmimi.StreamState:
    return MODEL.new_state(2)


# The dictionary among them is a valid `impl`, which requests nothing.
EMPTY: dict[str, str] = next(value for value in BAD_NAMES if isinstance(value, dict))
BAD_IMPLS = [*without(BAD_NAMES, EMPTY), {"resblock": 3}, {3: "cpu"}]
BAD_PATHS = without(ANYTHING, "m")
BAD_SOURCES = [*BAD_PATHS, "", "no/such/model", "a\0b", "x" * 5000, "random:" + "9" * 30]
BAD_SIZES = [None, *without(BAD_COUNTS, 10**30)]
JODIO = random(JodioConfig.small()).eval()
CALLS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "encode: audio": (MODEL.encode, ANYTHING + BAD_TENSORS),
    "encode: state": (lambda x: MODEL.encode(AUDIO, state=x), without(ANYTHING, None)),
    "encode: padding_mask": (lambda x: MODEL.encode(AUDIO, padding_mask=x), without(ANYTHING, None) + BAD_TENSORS[:2]),
    "encode: num_codebooks": (lambda x: MODEL.encode(AUDIO, num_codebooks=x), BAD_COUNTS),
    "encode: last_frame": (lambda x: MODEL.encode(AUDIO, last_frame=x), [None, *BAD_NAMES]),
    "encode_to_latent: audio": (MODEL.encode_to_latent, ANYTHING + BAD_TENSORS),
    "straight_through: audio": (MODEL.straight_through, ANYTHING + BAD_TENSORS),
    "straight_through: num_codebooks": (lambda x: MODEL.straight_through(AUDIO, x), BAD_COUNTS),
    "flush: state": (MODEL.flush, ANYTHING),
    "flush: num_codebooks": (lambda x: MODEL.flush(state(), num_codebooks=x), BAD_COUNTS),
    "quantize: latents": (MODEL.quantize, ANYTHING + BAD_TENSORS),
    "quantize: num_codebooks": (lambda x: MODEL.quantize(LATENTS, x), BAD_COUNTS),
    "frame_mask": (MODEL.frame_mask, ANYTHING + BAD_TENSORS[:2]),
    "decode: codes": (MODEL.decode, ANYTHING + BAD_TENSORS + [CODES.float(), CODES > 0]),
    "decode: state": (lambda x: MODEL.decode(CODES, state=x), without(ANYTHING, None)),
    "decode: padding_mask": (lambda x: MODEL.decode(CODES, padding_mask=x), without(ANYTHING, None) + BAD_TENSORS[:2]),
    "dequantize: codes": (MODEL.dequantize, ANYTHING + BAD_TENSORS),
    "decode_latent: latents": (MODEL.decode_latent, ANYTHING + BAD_TENSORS),
    "decode_latent: state": (lambda x: MODEL.decode_latent(LATENTS, state=x), without(ANYTHING, None)),
    "num_codebooks": (lambda x: setattr(MODEL, "num_codebooks", x), [None, *BAD_COUNTS]),
    "new_state: batch_size": (MODEL.new_state, [None, 0, *BAD_COUNTS]),
    "state.reset": (lambda x: state().reset(x), without(ANYTHING, None) + BAD_TENSORS + [[True], [1, 0], np.ones(2)]),
    "state.exec_mask": (lambda x: setattr(state(), "exec_mask", x), ANYTHING + BAD_TENSORS),
    "state.load_state_dict": (lambda x: state().load_state_dict(x), ANYTHING),
    "state.load_state_dict: value": (
        lambda x: state().load_state_dict({**state().state_dict(), "pending": x}), ANYTHING + BAD_TENSORS
    ),
    "load: source": (fastmimi.load, BAD_SOURCES),
    "load: device": (lambda x: fastmimi.load("demo", device=x), [None, "cuda:99", "meta", *BAD_NAMES]),
    "load: dtype": (lambda x: fastmimi.load("demo", dtype=x), [None, *BAD_NAMES, torch.int64, torch.complex64]),
    "load: impl": (lambda x: fastmimi.load("demo", impl=x), [None, *BAD_IMPLS]),
    "load: num_codebooks": (lambda x: fastmimi.load("demo", num_codebooks=x), BAD_COUNTS),
    "load: weights": (lambda x: fastmimi.load("demo", weights=x), ["int9", *BAD_NAMES]),
    "explain: device": (fastmimi.explain, [None, "cuda:1", *BAD_NAMES]),
    "explain: dtype": (lambda x: fastmimi.explain("cpu", x), [None, *BAD_NAMES, torch.int64]),
    "explain: impl": (lambda x: fastmimi.explain("cpu", torch.float32, x), [None, *BAD_IMPLS]),
    "Mimi: config": (Mimi, [*without(ANYTHING, None), JodioConfig.small()]),
    "Mimi: impl": (lambda x: Mimi(MODEL.config, impl=x), [None, "fast", 3]),
    "Mimi: num_codebooks": (lambda x: Mimi(MODEL.config, num_codebooks=x), BAD_COUNTS),
    "JodioModel: config": (JodioModel, [*without(ANYTHING, None), MODEL.config]),
    "JodioModel.from_pretrained": (JodioModel.from_pretrained, BAD_PATHS),
    "JodioModel.save_pretrained": (JODIO.save_pretrained, BAD_PATHS),
    "JodioModel.encode": (JODIO.encode, ANYTHING + BAD_TENSORS),
    "save_pretrained: model": (lambda x: fastmimi.save_pretrained(x, "out"), ANYTHING),
    "save_pretrained: directory": (lambda x: fastmimi.save_pretrained(MODEL, x), BAD_PATHS),
    "export_model: model": (lambda x: fastmimi.export_model(x, "out", format="pt2"), ANYTHING),
    "export_model: directory": (lambda x: fastmimi.export_model(MODEL, x, format="pt2"), BAD_PATHS),
    "export_model: format": (lambda x: fastmimi.export_model(MODEL, "out", format=x), ANYTHING),
    "export_model: weights": (lambda x: fastmimi.export_model(MODEL, "out", format="pt2", weights=x), ANYTHING),
    "save_kyutai: model": (lambda x: fastmimi.save_kyutai(x, "out"), ANYTHING),
    "save_kyutai: path": (lambda x: fastmimi.save_kyutai(MODEL, x), BAD_PATHS),
    "fingerprint": (fingerprint, ANYTHING),
    "replace_mimi": (fastmimi.replace_mimi, ANYTHING),
    "restore_mimi": (fastmimi.restore_mimi, ANYTHING),
    "probe": (audio.probe, BAD_PATHS),
    "output_format": (audio.output_format, ANYTHING),
    "Tokens.load": (tokens.Tokens.load, BAD_PATHS),
    "Tokens.save": (TOKENS.save, BAD_PATHS),
    "Tokens.first": (TOKENS.first, [0, 7, *BAD_COUNTS]),
    "Tokens: codes": (lambda x: dataclasses.replace(TOKENS, codes=x), [*ANYTHING, CODES[0]]),
    "Tokens: length": (lambda x: dataclasses.replace(TOKENS, length=x), [None, *BAD_COUNTS]),
    "Tokens: frame_size": (lambda x: dataclasses.replace(TOKENS, frame_size=x), [None, *BAD_COUNTS]),
    "Tokens: codebook_size": (lambda x: dataclasses.replace(TOKENS, codebook_size=x), BAD_SIZES),
    "Tokens: frame_rate": (lambda x: dataclasses.replace(TOKENS, frame_rate=x), [None, "1", [1], NAN, -1.0, True]),
    "Tokens: model": (lambda x: dataclasses.replace(TOKENS, model=x), BAD_PATHS),
    "Tokens: packed": (lambda x: dataclasses.replace(TOKENS, packed=x), without(ANYTHING, True)),
    "moshi: get_mimi": (moshi_drop_in.get_mimi, without(ANYTHING, None, "m")),
    "moshi: mimi_config": (lambda x: moshi_drop_in.get_mimi(None, x), without(ANYTHING, None)),
    "moshi: device": (lambda x: moshi_drop_in.get_mimi(None, device=x), BAD_NAMES),
}  # fmt: skip
CASES = [(name, value) for name, (_, values) in CALLS.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}-{type(value).__name__}" for name, value in CASES])
def test_invalid_arguments_raise_an_input_error_of_one_line(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as error:
        CALLS[name][0](value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not list(tmp_path.iterdir())


# Other types that are accepted


@pytest.mark.parametrize(
    "convert", [np.array, list, lambda mask: torch.tensor(mask), lambda mask: np.array(mask, np.float32)]
)
def test_masks_of_samples_may_be_lists_and_arrays(convert: Callable[[Any], Any]) -> None:
    rows = [[True] * 100, [True] * 60 + [False] * 40]
    mask = torch.tensor(rows)
    codes = MODEL.encode(AUDIO, padding_mask=convert(rows))
    frames = MODEL.frame_mask(convert(rows))
    assert torch.equal(codes, MODEL.encode(AUDIO, padding_mask=mask))
    assert torch.equal(frames, MODEL.frame_mask(mask))
    sound = MODEL.decode(codes, padding_mask=convert(frames.tolist()))
    assert torch.equal(sound, MODEL.decode(codes, padding_mask=frames))


@pytest.mark.parametrize("convert", [np.array, list, tuple, torch.tensor])
def test_masks_of_streams_may_be_lists_and_arrays(convert: Callable[[Any], Any]) -> None:
    streams = state()
    address = streams.exec_mask.data_ptr()
    streams.exec_mask = convert([True, False])
    assert streams.exec_mask.tolist() == [True, False] and streams.exec_mask.data_ptr() == address
    MODEL.encode(AUDIO, state=streams)
    assert streams.pending_length.tolist() == [4, 0]
    streams.reset(convert([True, False]))
    assert streams.pending_length.tolist() == [0, 0] and streams.exec_mask.tolist() == [True, False]


def test_counts_may_be_numpy_integers() -> None:
    assert MODEL.encode(AUDIO, num_codebooks=np.int64(3)).shape[1] == 3
    assert MODEL.new_state(np.int32(2)).batch_size == 2


def test_a_state_of_another_configuration_is_refused() -> None:
    other = small_model(**FAST, num_hidden_layers=1)
    with pytest.raises(InputError, match="the state is for a model of another configuration"):
        MODEL.encode(AUDIO, state=other.new_state(2))
    with pytest.raises(InputError, match="the state is for a model of another configuration"):
        MODEL.decode(CODES, state=other.new_state(2).clone())
    same = small_model(seed=1, **FAST)
    assert MODEL.encode(AUDIO, state=same.new_state(2)).shape == (2, 6, 2)


@pytest.mark.parametrize("name, value", [("encode.offset", -1), ("decode.offset", 1 << 60), ("pending_length", 48)])
def test_saved_positions_out_of_range_are_refused(name: str, value: int) -> None:
    streams = state()
    wrong = {**streams.clone().state_dict(), name: torch.tensor([0, value])}
    with pytest.raises(InputError, match=rf"{name} must lie in \[0, \d+\], got \[0, {value}\]"):
        streams.load_state_dict(wrong)
