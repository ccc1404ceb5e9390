"""Exported files compute what the model does, whole and in any chunks; and what a bad argument gets."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi import ContinuousMimiConfig, JodioConfig, MimiCodecConfig
from fastmimi.checkpoints.weights import load, random, save_pretrained
from fastmimi.cli import app
from fastmimi.devtools.testing import CONFIGS, SMALL, assert_same_codes, noise, relative_error, small_model
from fastmimi.errors import InputError
from fastmimi.export import formats
from fastmimi.export.frozen import rounded

FAST = {"upsampling_ratios": [8, 3], "num_hidden_layers": 1, "sliding_window": 12}  # frames of 48 samples


@pytest.fixture(scope="module")
def onnxruntime():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def model():
    return small_model(**FAST)


@pytest.fixture(scope="module")
def exported(model, onnxruntime, tmp_path_factory):
    """The folder of the model's ONNX files, not checked."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    fastmimi.export_model(model, folder, check=False)
    return folder


class Streams:
    """Streams through one of the files, by ONNX Runtime and codec.json alone."""

    def __init__(self, onnxruntime, folder, name, batch=1):
        self.file = json.loads((folder / "codec.json").read_text())["files"][name]
        self.session = onnxruntime.InferenceSession(folder / self.file["file"])
        self.state = {
            port["name"]: np.zeros([batch, *port["shape"][1:]], port["dtype"]) for port in self.file.get("state", ())
        }

    def __call__(self, x):
        names = [self.file["output"]["name"], *(port["output"] for port in self.file.get("state", ()))]
        y, *new = self.session.run(names, {self.file["input"]["name"]: x.numpy(), **self.state})
        self.state = dict(zip(self.state, new, strict=True))
        return torch.from_numpy(y)


@pytest.mark.slow
def test_the_description_is_what_the_files_have(model, onnxruntime, exported):
    description = json.loads((exported / "codec.json").read_text())
    assert {path.name for path in exported.iterdir()} == {
        "codec.json", *(file["file"] for file in description["files"].values())
    }  # fmt: skip
    assert list(description["files"]) == ["encoder", "encoder_step", "decoder", "decoder_step"]
    assert (description["sample_rate"], description["frame_size"], description["opset"]) == (24_000, 48, 18)
    assert (description["codebooks"], description["codebook_size"]) == (6, 64)
    assert description["fingerprint"] == fastmimi.checkpoints.weights.fingerprint(model)
    kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    for name, file in description["files"].items():
        session = onnxruntime.InferenceSession(exported / file["file"])
        state = file.get("state", [])
        assert bool(state) == name.endswith("_step")
        inputs, outputs = [file["input"], *state], [file["output"], *state]
        for ports, found in ((inputs, session.get_inputs()), (outputs, session.get_outputs())):
            described = [(kinds[port["dtype"]], port["shape"]) for port in ports]
            assert described == [(node.type, node.shape) for node in found]
        assert [port["name"] for port in inputs] == [node.name for node in session.get_inputs()]
        names = [port.get("output", port["name"]) for port in outputs]
        assert names == [node.name for node in session.get_outputs()]
        assert (exported / file["file"]).stat().st_size == file["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 47, 48, 49, 3 * 48, 100 * 48 + 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_whole_audio(model, onnxruntime, exported, batch, samples):
    encode, decode = (Streams(onnxruntime, exported, name) for name in ("encoder", "decoder"))
    audio = noise(batch, 1, samples)
    codes = encode(audio)
    assert_same_codes(codes, model.encode(audio), model.encode_to_latent(audio), model)
    for count in (1, 2, 6):
        want = model.decode(codes[:, :count])
        assert (decode(codes[:, :count]) - want).abs().max() <= 1e-6 * max(1.0, want.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(1,) * 40, (40,), (2, 1, 30, 7), (13, 27)], ids=str)
def test_any_chunks_give_the_whole(model, onnxruntime, exported, chunks):
    """Beyond the attention window of 12 positions, 6 frames; all by ONNX Runtime."""
    audio = noise(2, 1, sum(chunks) * 48 - 5)
    codes = Streams(onnxruntime, exported, "encoder")(audio)
    whole = Streams(onnxruntime, exported, "decoder")(codes)
    encode, decode = (Streams(onnxruntime, exported, f"{name}_step", batch=2) for name in ("encoder", "decoder"))
    parts = [encode(chunk) for chunk in audio.split([48 * n for n in chunks[:-1]] + [48 * chunks[-1] - 5], dim=-1)]
    assert torch.equal(torch.cat(parts, dim=-1), codes)
    assert relative_error(torch.cat([decode(part) for part in parts], dim=-1), whole) < 1e-5


@pytest.mark.slow
def test_streams_of_a_batch_may_be_at_different_places(model, onnxruntime, exported):
    encode = Streams(onnxruntime, exported, "encoder_step", batch=2)
    audio = noise(2, 1, 30 * 48)
    encode(audio[..., : 20 * 48])
    for tensor in encode.state.values():
        tensor[1] = 0  # starts anew
    codes = encode(audio[..., 20 * 48 :])
    assert torch.equal(codes[:1], model.encode(audio[:1])[..., 20:])
    assert torch.equal(codes[1:], model.encode(audio[1:, :, 20 * 48 :]))


VARIANTS = {  # fields of several configurations, because each export takes half a minute; number of codebooks
    "stereo, attention": (["stereo", "attention"], 4),
    "replicate, unprojected": (["replicate", "unprojected"], 4),
    "semantic codebooks only": (["semantic"], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations(onnxruntime, tmp_path, variant, format):
    """`export_model` compares the files itself."""
    names, count = VARIANTS[variant]
    fields = {name: value for config in names for name, value in CONFIGS[config].items() if value != SMALL.get(name)}
    model = small_model(**{**fields, **FAST})
    model.num_codebooks = count
    description = fastmimi.export_model(model, tmp_path / "out", format=format)
    assert description["files"]["encoder"]["output"]["shape"] == ["batch", count, "frames"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_jodio(tmp_path, monkeypatch, weights):
    """With weight norm, which is folded, and without a downsampling before the quantizer."""
    monkeypatch.setattr("fastmimi.runtime.quantized.LEAST_WEIGHTS", 256)
    fastmimi.export_model(random(JodioConfig.small()).eval(), tmp_path / "out", format="pt2", weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_weights_are_stored_small(onnxruntime, tmp_path, monkeypatch, format):
    """Files shrink, and compute what the model with such weights does."""
    monkeypatch.setattr("fastmimi.runtime.quantized.LEAST_WEIGHTS", 256)
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "upsample_groups": 128}
    model, audio = small_model(**{**FAST, **sizes}), noise(1, 1, 4800)
    wide = fastmimi.export_model(model, tmp_path / "wide", format=format, check=False)
    # the graph and the codebooks stay as they are
    for weights, share in {"float16": 0.75, "int8": 0.6}.items():
        small = fastmimi.export_model(model, tmp_path / weights, format=format, weights=weights)
        for name, file in small["files"].items():
            assert file["bytes"] < share * wide["files"][name]["bytes"], (weights, name)
        assert not torch.equal(rounded(model, weights).encode_to_latent(audio), model.encode_to_latent(audio))


@pytest.mark.slow
def test_int8_is_the_grid_of_load(tmp_path):
    save_pretrained(fastmimi.load("demo"), tmp_path)
    ours, theirs = rounded(load(tmp_path), "int8"), load(tmp_path, weights="int8")
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["result", "state"])
@pytest.mark.parametrize("name", ["encoder", "decoder_step"])
def test_a_file_that_computes_something_else_is_found(model, tmp_path, monkeypatch, name, spoil):
    if (name, spoil) == ("encoder", "state"):
        pytest.skip("an encoder of whole audio has no state")
    honest = formats.FORMATS["pt2"]

    def opened(traced, path):
        run = honest.open(traced, path)

        def wrong(x, state):
            y, new = run(x, state)
            if traced.name != name:
                return y, new
            return (y.roll(1, -1), new) if spoil == "result" else (y, {k: t * 0 for k, t in new.items()})

        return wrong

    monkeypatch.setitem(formats.FORMATS, "pt2", dataclasses.replace(honest, open=opened))
    with pytest.raises(AssertionError):
        fastmimi.export_model(model, tmp_path / "out", format="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_half_a_model(tmp_path):
    decoder = small_model(**FAST, has_encoder=False)
    assert list(fastmimi.export_model(decoder, tmp_path / "out", format="pt2")["files"]) == ["decoder", "decoder_step"]


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"format 'onnx' needs onnx, onnxscript: pip install 'fastmimi\[onnx\]'"):
        fastmimi.export_model(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be onnx or pt2, got 'tflite'"),
        ({"format": "pt2", "weights": "int4"}, "weights must be float32, float16, int8, got 'int4'"),
    ],
)
def test_a_bad_option_is_named(model, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        fastmimi.export_model(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_stream_is_refused(tmp_path):
    with pytest.raises(InputError, match="stream"):
        fastmimi.export_model(small_model("not_causal"), tmp_path / "out", format="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(model, tmp_path):
    save_pretrained(model, tmp_path / "small")
    arguments = ["export", str(tmp_path / "small"), str(tmp_path / "out"), "--format", "pt2", "--codebooks", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "encoder_step.pt2" in result.stdout and "codes equal" in result.stdout
    assert json.loads((tmp_path / "out" / "codec.json").read_text())["codebooks"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "tflite"], "format must be onnx or pt2, got 'tflite'"),
        (["--format", "pt2", "--weights", "int4"], "weights must be float32, float16, int8, got 'int4'"),
        (["--format", "pt2", "--page", "."], "no onnxruntime-web in ."),
        (["--format", "pt2", "--codebooks", "99"], "the number of codebooks must be from"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "demo", "out", *options])
    assert result.exit_code == 2 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_codes_is_refused(tmp_path):
    small = MimiCodecConfig.from_dict({**CONFIGS["small"], "hidden_act": "gelu"})
    continuous = random(ContinuousMimiConfig(encoder=small, decoder=small)).eval()
    with pytest.raises(InputError, match="only a codec with codes can be exported, got a ContinuousMimi"):
        fastmimi.export_model(continuous, tmp_path / "out", format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        fastmimi.export_model(model, tmp_path, format="pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
