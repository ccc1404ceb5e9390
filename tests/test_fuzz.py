"""Mutated files and arguments either work or raise an InputError of one line: no other exception, hang or crash.

By default every run has the same examples and takes half a minute. `make fuzz` (--hypothesis-profile=fuzz) runs new
examples for ten minutes, and prints each failure with the line that reproduces it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fastmimi
from fastmimi import JodioConfig, Mimi, MimiCodecConfig
from fastmimi.checkpoints.weights import save_kyutai, save_pretrained
from fastmimi.cli import app
from fastmimi.devtools.testing import SMALL, noise, result_or_none, small_model
from fastmimi.io import audio
from fastmimi.io.tokens import Tokens
from fastmimi.models.config import JodioTransformerConfig

pytestmark = pytest.mark.slow

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples
MODEL = small_model(**FAST, num_hidden_layers=1)
FUZZ_PROFILE = settings().max_examples > 1000  # the profile "fuzz"
FUZZ_FACTOR = 24


def examples(count: int) -> settings:
    """Settings for `count` examples, the same at each run; with the profile "fuzz", for more and new ones."""
    return (
        settings(max_examples=count * FUZZ_FACTOR, derandomize=False)
        if FUZZ_PROFILE
        else settings(max_examples=count, derandomize=True)
    )


# Values in place of those that are expected

NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.sampled_from([2**31, 2**63, 10**30, 0.5, 1.0]), st.floats(), st.booleans()
)
LEAVES = st.one_of(
    st.none(), NUMBERS, st.text(max_size=8), st.sampled_from(["default", "linear", "yarn", "mimi", "gelu"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.one_of(
    VALUES,
    st.binary(max_size=8),
    st.complex_numbers(),
    st.sampled_from([torch.float32, torch.device("cpu"), object(), Path("x"), np.float32(1), np.int64(2)]),
)


def mutated(data: st.DataObject, whole: bytes, header: int | None = None) -> bytes:
    """The bytes with some of the first `header` ones changed, inserted or deleted, or the rest cut off."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, min(len(content), header or len(content))))
        match data.draw(st.sampled_from(["bits", "value", "insert", "delete", "cut", "number"])):
            case "bits" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "value" if at < len(content):
                content[at] = data.draw(st.integers(0, 255))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 8))]
            case "number":
                width = data.draw(st.sampled_from("<BHIQ"[1:]))
                most = (1 << 8 * struct.calcsize(width)) - 1
                value = data.draw(st.sampled_from([0, 1, most, most // 2, most // 2 + 1]))
                content[at : at + struct.calcsize(width)] = struct.pack("<" + width, value)
            case "cut" if data.draw(st.booleans()):
                del content[at:]
    return bytes(content)


def changed_header(data: st.DataObject, whole: bytes) -> bytes:
    """A safetensors file with a change in the header, of one tensor or of the metadata."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(sorted(header[name])))
    kinds = st.sampled_from(
        ["I32", "U32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E5M2", "F8_E8M0", "F4", "X"]
    )
    match data.draw(st.sampled_from(["drop", "rename", "dtype", "shape", "value"])):
        case "drop":
            del header[name]
        case "rename":
            header[data.draw(st.text(max_size=8) | st.sampled_from(sorted(header)))] = header.pop(name)
        case "dtype" if "dtype" in header[name]:
            header[name]["dtype"] = data.draw(kinds)
        case "shape" if "shape" in header[name]:
            total = math.prod(header[name]["shape"])
            header[name]["shape"] = data.draw(
                st.sampled_from([[total], [1, total], [total, 1, 1], [], [0], [-total, -1]])
            )
        case _:
            header[name][key] = data.draw(VALUES)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small valid file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_pretrained(MODEL, folder / "model")
    save_kyutai(small_model(**FAST, num_hidden_layers=1, head_dim=8), folder / "kyutai.safetensors")
    codes = MODEL.encode(noise(1, 1, 300))[0].numpy()
    for name, packed in (("plain.st", False), ("packed.st", True)):
        Tokens(codes, 64, 24_000, 500.0, 48, 300, "f", "model", packed).save(folder / name)
    for suffix, subtype in (
        ("wav", "PCM_16"),
        ("flac", "PCM_16"),
        ("ogg", "VORBIS"),
        ("aiff", "FLOAT"),
        ("au", "ULAW"),
    ):
        samples = noise(600, 2).numpy().clip(-1, 1)
        soundfile.write(folder / f"a.{suffix}", samples, 24_000, subtype=subtype)
    return folder


@pytest.mark.parametrize("name", ["plain.st", "packed.st"])
@examples(100)
@given(data=st.data())
def test_token_files(folder: Path, name: str, data: st.DataObject) -> None:
    whole, target = (folder / name).read_bytes(), folder / "mutated.st"
    change = data.draw(st.sampled_from([mutated, changed_header]))
    target.write_bytes(change(data, whole))
    found = result_or_none(lambda: Tokens.load(target))
    if found is not None:
        assert found.codes.min() >= 0 and found.codes.max() < found.codebook_size
        assert found.num_frames == -(-found.length // found.frame_size)
        again = folder / "again.st"
        found.save(again)
        assert np.array_equal(Tokens.load(again).codes, found.codes)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.aiff", "a.au"])
@examples(150)
@given(data=st.data())
def test_audio_files(folder: Path, name: str, data: st.DataObject) -> None:
    whole, target = (folder / name).read_bytes(), folder / f"mutated{Path(name).suffix}"
    target.write_bytes(mutated(data, whole, header=100))
    found = result_or_none(lambda: audio.probe(target))
    if found is not None and found.length_at(24_000) < 1_000_000:  # valid files can be too long to read
        blocks = result_or_none(lambda: list(audio.read_blocks(found, 24_000)))
        if blocks is not None:
            samples = np.concatenate(blocks)
            assert np.isfinite(samples).all() and len(samples) == found.length_at(24_000)


@pytest.mark.parametrize("name", ["model/model.safetensors", "kyutai.safetensors"])
@examples(150)
@given(data=st.data())
def test_checkpoints(folder: Path, name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = (folder / name).read_bytes()
    here = tmp_path_factory.getbasetemp() / "checkpoint"
    here.mkdir(exist_ok=True)
    (here / "config.json").unlink(missing_ok=True)
    if data.draw(st.booleans()):
        (here / "config.json").write_text(json.dumps(MODEL.config.to_dict()))
    size = 8 + int.from_bytes(whole[:8], "little")
    change = changed_header(data, whole) if data.draw(st.booleans()) else mutated(data, whole, header=size)
    target = here / "tokenizer-x.safetensors"
    target.unlink(missing_ok=True)  # since the file of an earlier example may still be memory-mapped
    target.write_bytes(change)
    model = result_or_none(lambda: fastmimi.load(target))
    if model is not None:
        assert model.decode(model.encode(noise(1, 1, 100))).shape == (1, 1, 144)


# Configurations


ROPE_NUMBERS = [
    "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "partial_rotary_factor", "attention_factor",
]  # fmt: skip


def config_values(kind: type, small: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The fields of a small configuration, some of them with arbitrary values."""
    names = st.sampled_from([f.name for f in fields(kind)] + ["rope_theta", "rope_scaling", "encoder_config"])
    numbers = {name: NUMBERS | st.sampled_from([2.0, 8.0]) for name in ROPE_NUMBERS}
    kinds = st.sampled_from(["default", "linear", "yarn", "llama3", "dynamic"])
    rope = st.fixed_dictionaries({"rope_type": kinds}, optional=numbers)
    plausible = st.integers(0, 9) | st.floats(0, 1) | st.lists(st.integers(1, 6), max_size=5) | rope
    return st.dictionaries(names, VALUES | plausible, max_size=3).map(lambda changes: {**small, **changes})


@examples(400)
@given(values=config_values(MimiCodecConfig, {**SMALL, **FAST}))
def test_configurations(values: dict[str, Any]) -> None:
    config = result_or_none(lambda: MimiCodecConfig.from_dict(values))
    if config is None:
        return
    assert MimiCodecConfig.from_dict(config.to_dict()) == config
    if config.num_parameters < 300_000 and config.frame_size < 5000 and config.sliding_window < 5000:
        model = result_or_none(lambda: fastmimi.checkpoints.weights.random(config).eval().requires_grad_(False))
        if model is not None and model.encoder is not None and model.decoder is not None:
            audio_in = noise(1, config.audio_channels, 2 * config.frame_size)
            codes = result_or_none(lambda: model.encode(audio_in))  # reflect padding needs enough samples
            assert codes is None or model.decode(codes).shape[-1] == codes.shape[-1] * config.frame_size
            assert config.num_parameters == sum(t.numel() for t in model.state_dict().values())


@examples(100)
@given(
    values=config_values(JodioConfig, JodioConfig.small().to_dict()), inner=config_values(JodioTransformerConfig, {})
)
def test_configurations_of_jodio(values: dict[str, Any], inner: dict[str, Any]) -> None:
    config = result_or_none(lambda: JodioConfig.from_dict({**values, "decoder_transformer": inner}))
    assert config is None or JodioConfig.from_dict(config.to_dict()) == config


@examples(200)
@given(data=st.data())
def test_config_files(folder: Path, data: st.DataObject) -> None:
    path = folder / "model" / "config.json"
    whole = json.dumps(MODEL.config.to_dict()).encode()
    path.write_bytes(mutated(data, whole))
    try:
        model = result_or_none(lambda: fastmimi.load(folder / "model"))
    finally:
        path.write_bytes(whole)
    assert model is None or model.total_codebooks >= 2


TRAINING = b"""out: run
steps: 100
data: {folder: speech, seconds: 1.5, batch_size: 2}
optimizer: {lr: 1e-4, betas: [0.5, 0.9]}
discriminator: {n_ffts: [256, 128]}
model: {architecture: mimi, changes: {hidden_size: 32, upsampling_ratios: [4, 2]}, freeze: [encoder]}
"""
YAML = [
    b"*a", b"&a ", b"!!binary x", b"!!set {a}", b"${out}", b"${oc.env:X}", b"null", b"true", b".inf", b"1e400", b"[",
    b"{", b"- ", b"\n", b"9" * 400, b"2020-01-01", b"<<: {a: b}", b"???", b"? x", b"%TAG", b"---",
]  # fmt: skip


@examples(120)
@given(data=st.data())
def test_training_configurations(folder: Path, data: st.DataObject) -> None:
    from fastmimi.train.config import TrainConfig

    path, content = folder / "train.yaml", TRAINING
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content = content[:at] + data.draw(st.sampled_from(YAML)) + content[at + data.draw(st.integers(0, 6)) :]
    path.write_bytes(mutated(data, content) if data.draw(st.booleans()) else content)
    changes = data.draw(
        st.lists(st.text(max_size=12) | st.sampled_from(["steps=3", "data=x", "a=[", "out=${"]), max_size=2)
    )
    config = result_or_none(lambda: TrainConfig.read(path, changes))
    if config is not None:
        config.write(folder / "again.yaml")
        assert isinstance(config.steps, int) and config.steps >= 1


# Arguments


TENSORS = st.builds(
    lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool, torch.cfloat]
    ),
    st.sampled_from(["cpu", "cpu", "meta"]),
)
ARGUMENTS = (
    OBJECTS | TENSORS | st.builds(np.zeros, st.integers(0, 3), st.sampled_from(["f4", "i8", "?", "c8", "O", "U1"]))
)
STREAM = MODEL.new_state(1)
METHODS: list[Callable[..., Any]] = [
    lambda x, y: MODEL.encode(x, padding_mask=y),
    lambda x, y: MODEL.encode(x, state=y),
    lambda x, y: MODEL.encode(noise(1, 1, 60), padding_mask=x, num_codebooks=y),
    lambda x, y: MODEL.encode(noise(1, 1, 60), last_frame=x, num_codebooks=y),
    lambda x, y: MODEL.encode(x, state=STREAM, num_codebooks=y),
    lambda x, y: MODEL.encode_to_latent(x, padding_mask=y),
    lambda x, y: MODEL.straight_through(x, y),
    lambda x, y: MODEL.quantize(x, y),
    lambda x, y: MODEL.decode(x, padding_mask=y),
    lambda x, y: MODEL.decode(x, state=y),
    lambda x, y: MODEL.decode(x, state=STREAM),
    lambda x, y: MODEL.decode_latent(x, state=y),
    lambda x, y: MODEL.dequantize(x),
    lambda x, y: MODEL.frame_mask(x),
    lambda x, y: MODEL.flush(x, num_codebooks=y),
    lambda x, y: MODEL.new_state(x) if not isinstance(x, int) or x < 100 else None,
    lambda x, y: STREAM.clone().reset(x),
    lambda x, y: setattr(STREAM.clone(), "exec_mask", x),
    lambda x, y: STREAM.clone().load_state_dict(x),
    lambda x, y: STREAM.clone().load_state_dict({**STREAM.state_dict(), "pending": x, "encode.offset": y}),
    lambda x, y: fastmimi.load("demo", device=x, dtype=y),
    lambda x, y: fastmimi.load("demo", impl=x, num_codebooks=y),
    lambda x, y: fastmimi.load("demo", weights=x, impl=y),
    lambda x, y: fastmimi.explain(x, y),
    lambda x, y: fastmimi.explain("cpu", torch.float32, x),
    lambda x, y: Mimi(MODEL.config, impl=x, num_codebooks=y),
    lambda x, y: MimiCodecConfig.from_dict(x),
    lambda x, y: fastmimi.replace_mimi(x),
    lambda x, y: Tokens(x, 64, 24_000, 500.0, 48, y, "f", "m"),
    lambda x, y: Tokens(np.zeros((1, 1), int), x, 24_000, y, 48, 40, "f", "m").to_bytes(),
]


@examples(400)
@given(method=st.sampled_from(METHODS), x=ARGUMENTS, y=ARGUMENTS)
def test_arguments(method: Callable[..., Any], x: Any, y: Any) -> None:
    result_or_none(lambda: method(x, y))


# The command line


@examples(150)
@given(data=st.data())
def test_commands(folder: Path, data: st.DataObject) -> None:
    """Exit code 0, or 2 with an error of one line and no files written."""
    names = st.sampled_from(
        ["in.wav", "plain.st", "model", "no", "out/a", "out/a.wav", "out/a.st", "", "out", "cut.st", "a\0b"]
    )
    words = names | st.text(max_size=6)
    options = ["--codebooks", "--device", "--dtype", "--impl", "--plot", "--tokens", "--model"]
    command = data.draw(st.sampled_from(["encode", "decode", "roundtrip", "info", "explain"]))
    args = [command, *data.draw(st.lists(words, max_size=2)), "--model", "model"][: 4 if command != "info" else 2]
    for name in data.draw(st.lists(st.sampled_from(options), max_size=2)):
        args += [
            name,
            data.draw(words | st.integers().map(str) | st.sampled_from(["cpu", "float32", "reference", "demo"])),
        ]
    out = folder / "out"
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        if not Path("in.wav").exists():
            Path("in.wav").write_bytes(Path("a.wav").read_bytes())
            Path("cut.st").write_bytes(Path("plain.st").read_bytes()[:200])
        before = set(os.listdir())
        result = CliRunner().invoke(app, args)
        assert isinstance(result.exception, SystemExit | None), (args, result.exception)
        assert result.exit_code in (0, 2), (args, result.stderr)
        if result.exit_code == 2:
            assert result.stderr.splitlines()[-1].startswith("error: "), (args, result.stderr)
            assert set(os.listdir()) == before and not os.listdir("out"), args
        for name in set(os.listdir()) - before:
            Path(name).unlink()
