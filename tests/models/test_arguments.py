"""Arguments of the wrong kind: each public function says in one InputError what it wants, and masks may be lists."""

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
from fastmimi.compat import moshi as moshi_face
from fastmimi.devtools.testing import noise, small_model
from fastmimi.io import audio, tokens

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples
MODEL = small_model(**FAST)
AUDIO, CODES, LATENTS = noise(2, 1, 100), torch.zeros(2, 6, 3, dtype=torch.long), noise(2, 32, 3)
TOKENS = tokens.Tokens(CODES[0].numpy(), 64, 24_000, 500.0, 48, 144, "f", "m")
NAN = float("nan")
ANYTHING: list[Any] = [None, 3, 1.5, "m", b"m", [], {}, object(), True, np.zeros(2), [[1], [2, 3]], 1j]
NO_TENSORS: list[Any] = [
    torch.zeros(2, 1, 100, device="meta"),
    torch.zeros(2, 1, 100, dtype=torch.complex64),
    torch.zeros(2, 1, 100, dtype=torch.bool),
    torch.zeros(2, 6, 3, device="meta", dtype=torch.long),
    torch.zeros(2, 6, 3).to_sparse(),
    torch.zeros(2, 32, 3, device="meta"),
    torch.zeros(()),
    torch.zeros(0, 1, 100),
]
NO_COUNTS: list[Any] = [True, 1.5, 8.0, "8", float("nan"), float("inf"), 10**30, -1, [8], b"8", torch.tensor(8), 1j]
NO_NAMES: list[Any] = [
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
    """The values but those that are arguments of another meaning."""
    return [value for value in values if not any(value is other for other in allowed)]


def state() -> fastmimi.StreamState:
    return MODEL.new_state(2)


EMPTY: dict[str, str] = next(value for value in NO_NAMES if isinstance(value, dict))  # as `impl`, nothing asked for
NO_IMPLS = [*without(NO_NAMES, EMPTY), {"resblock": 3}, {3: "cpu"}]
NO_PATHS = without(ANYTHING, "m")
NO_SOURCES = [*NO_PATHS, "", "no/such/model", "a\0b", "x" * 5000, "random:" + "9" * 30]
NO_SIZES = [None, *without(NO_COUNTS, 10**30)]
JODIO = random(JodioConfig.small()).eval()
CALLS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "encode: audio": (MODEL.encode, ANYTHING + NO_TENSORS),
    "encode: state": (lambda x: MODEL.encode(AUDIO, state=x), without(ANYTHING, None)),
    "encode: padding_mask": (lambda x: MODEL.encode(AUDIO, padding_mask=x), without(ANYTHING, None) + NO_TENSORS[:2]),
    "encode: num_codebooks": (lambda x: MODEL.encode(AUDIO, num_codebooks=x), NO_COUNTS),
    "encode: last_frame": (lambda x: MODEL.encode(AUDIO, last_frame=x), [None, *NO_NAMES]),
    "encode_to_latent: audio": (MODEL.encode_to_latent, ANYTHING + NO_TENSORS),
    "straight_through: audio": (MODEL.straight_through, ANYTHING + NO_TENSORS),
    "straight_through: num_codebooks": (lambda x: MODEL.straight_through(AUDIO, x), NO_COUNTS),
    "flush: state": (MODEL.flush, ANYTHING),
    "flush: num_codebooks": (lambda x: MODEL.flush(state(), num_codebooks=x), NO_COUNTS),
    "quantize: latents": (MODEL.quantize, ANYTHING + NO_TENSORS),
    "quantize: num_codebooks": (lambda x: MODEL.quantize(LATENTS, x), NO_COUNTS),
    "frame_mask": (MODEL.frame_mask, ANYTHING + NO_TENSORS[:2]),
    "decode: codes": (MODEL.decode, ANYTHING + NO_TENSORS + [CODES.float(), CODES > 0]),
    "decode: state": (lambda x: MODEL.decode(CODES, state=x), without(ANYTHING, None)),
    "decode: padding_mask": (lambda x: MODEL.decode(CODES, padding_mask=x), without(ANYTHING, None) + NO_TENSORS[:2]),
    "dequantize: codes": (MODEL.dequantize, ANYTHING + NO_TENSORS),
    "decode_latent: latents": (MODEL.decode_latent, ANYTHING + NO_TENSORS),
    "decode_latent: state": (lambda x: MODEL.decode_latent(LATENTS, state=x), without(ANYTHING, None)),
    "num_codebooks": (lambda x: setattr(MODEL, "num_codebooks", x), [None, *NO_COUNTS]),
    "new_state: batch_size": (MODEL.new_state, [None, 0, *NO_COUNTS]),
    "state.reset": (lambda x: state().reset(x), without(ANYTHING, None) + NO_TENSORS + [[True], [1, 0], np.ones(2)]),
    "state.exec_mask": (lambda x: setattr(state(), "exec_mask", x), ANYTHING + NO_TENSORS),
    "state.load_state_dict": (lambda x: state().load_state_dict(x), ANYTHING),
    "state.load_state_dict: value": (
        lambda x: state().load_state_dict({**state().state_dict(), "pending": x}), ANYTHING + NO_TENSORS
    ),
    "load: source": (fastmimi.load, NO_SOURCES),
    "load: device": (lambda x: fastmimi.load("demo", device=x), [None, "cuda:99", "meta", *NO_NAMES]),
    "load: dtype": (lambda x: fastmimi.load("demo", dtype=x), [None, *NO_NAMES, torch.int64, torch.complex64]),
    "load: impl": (lambda x: fastmimi.load("demo", impl=x), [None, *NO_IMPLS]),
    "load: num_codebooks": (lambda x: fastmimi.load("demo", num_codebooks=x), NO_COUNTS),
    "load: weights": (lambda x: fastmimi.load("demo", weights=x), ["int9", *NO_NAMES]),
    "explain: device": (fastmimi.explain, [None, "cuda:1", *NO_NAMES]),
    "explain: dtype": (lambda x: fastmimi.explain("cpu", x), [None, *NO_NAMES, torch.int64]),
    "explain: impl": (lambda x: fastmimi.explain("cpu", torch.float32, x), [None, *NO_IMPLS]),
    "Mimi: config": (Mimi, [*without(ANYTHING, None), JodioConfig.small()]),
    "Mimi: impl": (lambda x: Mimi(MODEL.config, impl=x), [None, "fast", 3]),
    "Mimi: num_codebooks": (lambda x: Mimi(MODEL.config, num_codebooks=x), NO_COUNTS),
    "JodioModel: config": (JodioModel, [*without(ANYTHING, None), MODEL.config]),
    "JodioModel.from_pretrained": (JodioModel.from_pretrained, NO_PATHS),
    "JodioModel.save_pretrained": (JODIO.save_pretrained, NO_PATHS),
    "JodioModel.encode": (JODIO.encode, ANYTHING + NO_TENSORS),
    "save_pretrained: model": (lambda x: fastmimi.save_pretrained(x, "out"), ANYTHING),
    "save_pretrained: directory": (lambda x: fastmimi.save_pretrained(MODEL, x), NO_PATHS),
    "save_kyutai: model": (lambda x: fastmimi.save_kyutai(x, "out"), ANYTHING),
    "save_kyutai: path": (lambda x: fastmimi.save_kyutai(MODEL, x), NO_PATHS),
    "fingerprint": (fingerprint, ANYTHING),
    "replace_mimi": (fastmimi.replace_mimi, ANYTHING),
    "restore_mimi": (fastmimi.restore_mimi, ANYTHING),
    "probe": (audio.probe, NO_PATHS),
    "output_format": (audio.output_format, ANYTHING),
    "Tokens.load": (tokens.Tokens.load, NO_PATHS),
    "Tokens.save": (TOKENS.save, NO_PATHS),
    "Tokens.first": (TOKENS.first, [0, 7, *NO_COUNTS]),
    "Tokens: codes": (lambda x: dataclasses.replace(TOKENS, codes=x), [*ANYTHING, CODES[0]]),
    "Tokens: length": (lambda x: dataclasses.replace(TOKENS, length=x), [None, *NO_COUNTS]),
    "Tokens: frame_size": (lambda x: dataclasses.replace(TOKENS, frame_size=x), [None, *NO_COUNTS]),
    "Tokens: codebook_size": (lambda x: dataclasses.replace(TOKENS, codebook_size=x), NO_SIZES),
    "Tokens: frame_rate": (lambda x: dataclasses.replace(TOKENS, frame_rate=x), [None, "1", [1], NAN, -1.0, True]),
    "Tokens: model": (lambda x: dataclasses.replace(TOKENS, model=x), NO_PATHS),
    "Tokens: packed": (lambda x: dataclasses.replace(TOKENS, packed=x), without(ANYTHING, True)),
    "moshi: get_mimi": (moshi_face.get_mimi, without(ANYTHING, None, "m")),
    "moshi: mimi_config": (lambda x: moshi_face.get_mimi(None, x), without(ANYTHING, None)),
    "moshi: device": (lambda x: moshi_face.get_mimi(None, device=x), NO_NAMES),
}  # fmt: skip
CASES = [(name, value) for name, (_, values) in CALLS.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}-{type(value).__name__}" for name, value in CASES])
def test_a_wrong_argument_is_one_sentence(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as error:
        CALLS[name][0](value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not list(tmp_path.iterdir())


# What is right in other types


@pytest.mark.parametrize(
    "form", [np.array, list, lambda mask: torch.tensor(mask), lambda mask: np.array(mask, np.float32)]
)
def test_masks_of_samples_may_be_lists_and_arrays(form: Callable[[Any], Any]) -> None:
    rows = [[True] * 100, [True] * 60 + [False] * 40]
    mask = torch.tensor(rows)
    codes = MODEL.encode(AUDIO, padding_mask=form(rows))
    frames = MODEL.frame_mask(form(rows))
    assert torch.equal(codes, MODEL.encode(AUDIO, padding_mask=mask))
    assert torch.equal(frames, MODEL.frame_mask(mask))
    sound = MODEL.decode(codes, padding_mask=form(frames.tolist()))
    assert torch.equal(sound, MODEL.decode(codes, padding_mask=frames))


@pytest.mark.parametrize("form", [np.array, list, tuple, torch.tensor])
def test_masks_of_streams_may_be_lists_and_arrays(form: Callable[[Any], Any]) -> None:
    streams = state()
    address = streams.exec_mask.data_ptr()
    streams.exec_mask = form([True, False])
    assert streams.exec_mask.tolist() == [True, False] and streams.exec_mask.data_ptr() == address
    MODEL.encode(AUDIO, state=streams)
    assert streams.pending_length.tolist() == [4, 0]
    streams.reset(form([True, False]))
    assert streams.pending_length.tolist() == [0, 0] and streams.exec_mask.tolist() == [True, False]


def test_counts_may_be_numpys() -> None:
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
def test_a_saved_state_is_no_address(name: str, value: int) -> None:
    streams = state()
    wrong = {**streams.clone().state_dict(), name: torch.tensor([0, value])}
    with pytest.raises(InputError, match=rf"{name} must lie in \[0, \d+\], got \[0, {value}\]"):
        streams.load_state_dict(wrong)
