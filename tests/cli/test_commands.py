"""The command line: equal results of all commands, printed output and plots."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer
from typer.testing import CliRunner, Result

import fastmimi
from fastmimi.checkpoints import weights
from fastmimi.cli import app
from fastmimi.devtools.testing import small_model
from fastmimi.io.tokens import Tokens

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"
RATE = 44_100
FRAMES = 30_011  # of the test signal at that rate: 16_333 samples at 24 kHz, 8.5 frames of codes


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small checkpoints of several kinds."""
    kinds = {
        "small": small_model(),
        "stereo": small_model("stereo"),
        "not_causal": small_model("not_causal"),
        "rate": small_model(sampling_rate=48_000),
    }
    folder = tmp_path_factory.mktemp("models")
    kinds["jodio"] = weights.random(fastmimi.JodioConfig.small(), 0).eval()
    for name, codec in kinds.items():
        weights.save_pretrained(codec, folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that holds `in.wav`, stereo, and `out/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "out").mkdir()
    write_sound(tmp_path / "in.wav")
    return tmp_path


def write_sound(path: Path, frames: int = FRAMES, rate: int = RATE, channels: int = 2) -> None:
    seconds = np.arange(frames)[:, None] / rate
    tone = 0.3 * np.sin(2 * np.pi * (300 + 200 * seconds) * seconds + np.arange(channels))
    tone += np.random.default_rng(0).normal(0, 0.05, tone.shape)
    soundfile.write(path, tone, rate, subtype="FLOAT" if path.suffix == ".wav" else None)


def run(*args: object) -> Result:
    """Run a command that must succeed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def codes_of(path: str) -> np.ndarray:
    return Tokens.load(path).codes


# Results


@pytest.mark.slow
def test_all_commands_give_the_same_codes_and_audio(here: Path, models: dict[str, str]) -> None:
    common = "--model", models["small"]
    run("roundtrip", "in.wav", "out/whole.wav", "--tokens", "out/whole.st", *common)
    run("roundtrip", "in.wav", "out/stream.wav", "--tokens", "out/stream.st", "--stream", *common)
    run("encode", "in.wav", "out/encoded.st", *common)
    run("encode", "in.wav", "out/packed.st", "--packed", *common)
    run("decode", "out/packed.st", "out/decoded.wav", *common)
    run("decode", "out/encoded.st", "out/decoded-stream.wav", "--stream", *common)
    whole = Tokens.load("out/whole.st")
    assert whole.codes.shape == (6, 9)
    assert len(np.unique(whole.codes)) > 10
    for other in ("stream", "encoded", "packed"):
        np.testing.assert_array_equal(codes_of(f"out/{other}.st"), whole.codes)
    assert Path("out/packed.st").stat().st_size < Path("out/encoded.st").stat().st_size
    audio, rate = soundfile.read("out/whole.wav")
    assert rate == 24_000
    assert len(audio) == whole.length == round(FRAMES * 24_000 / RATE)
    assert Path("out/decoded.wav").read_bytes() == Path("out/whole.wav").read_bytes()
    for other in ("stream", "decoded-stream"):
        np.testing.assert_allclose(soundfile.read(f"out/{other}.wav")[0], audio, atol=2**-14)


def test_results_equal_those_of_the_model(here: Path, models: dict[str, str]) -> None:
    write_sound(here / "in.flac", rate=24_000, channels=1)
    samples = soundfile.read("in.flac", dtype="float32")[0]
    codec = weights.load(models["small"])
    codes = codec.encode(torch.from_numpy(samples)[None, None], num_codebooks=3)
    audio = codec.decode(codes)[0, 0, :FRAMES]
    run("roundtrip", "in.flac", "out/a.mat5", "--tokens", "out/a.st", "--codebooks", 3, "--model", models["small"])
    tokens = Tokens.load("out/a.st")
    np.testing.assert_array_equal(tokens.codes, codes[0])
    assert tokens.fingerprint == weights.fingerprint(codec)
    assert (tokens.model, tokens.length, tokens.packed) == (models["small"], FRAMES, False)
    np.testing.assert_allclose(soundfile.read("out/a.mat5")[0], audio, atol=1e-5)


@pytest.mark.slow
def test_real_speech_in_one_call_and_as_a_stream(here: Path) -> None:
    common = CLIP, "--model", "random:0", "--codebooks", 8
    whole = run("roundtrip", common[0], "out/whole.wav", "--tokens", "out/whole.st", "--packed", *common[1:])
    run("encode", common[0], "out/stream.st", "--stream", *common[1:])
    tokens = Tokens.load("out/whole.st")
    np.testing.assert_array_equal(codes_of("out/stream.st"), tokens.codes)
    assert tokens.codes.shape == (8, 174)
    assert tokens.length == soundfile.info("out/whole.wav").frames == 333_842
    assert "1.10 kbps" in whole.stdout
    assert "8 codebooks x 174 frames" in whole.stdout
    assert "times real time" in whole.stdout
    assert whole.stderr.count("\n") == 1
    assert "noise, by design" in whole.stderr


@pytest.mark.parametrize("frames", [1, 1919, 1920, 1921])
@pytest.mark.parametrize("stream", [False, True])
def test_any_length(here: Path, models: dict[str, str], frames: int, stream: bool) -> None:
    write_sound(here / "in.wav", frames, 24_000, 1)
    run("roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--model", models["small"], *["--stream"] * stream)
    assert codes_of("out/a.st").shape == (6, -(-frames // 1920))
    assert soundfile.info("out/a.wav").frames == frames


def test_stereo_noncausal_and_48_khz_models(here: Path, models: dict[str, str]) -> None:
    run("roundtrip", "in.wav", "out/stereo.wav", "--model", models["stereo"])
    assert soundfile.info("out/stereo.wav").channels == 2
    run("roundtrip", "in.wav", "out/whole.wav", "--tokens", "out/whole.st", "--model", models["not_causal"])
    assert codes_of("out/whole.st").shape == (6, 9)
    run("roundtrip", "in.wav", "out/rate.wav", "--model", models["rate"])
    assert soundfile.info("out/rate.wav").samplerate == 48_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(here: Path, models: dict[str, str], dtype: str) -> None:
    run("roundtrip", "in.wav", "out/a.wav", "--model", models["small"], "--dtype", dtype)
    assert np.abs(soundfile.read("out/a.wav")[0]).max() > 0


def test_decoding_fewer_codebooks(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "out/a.st", "--model", models["small"])
    run("encode", "in.wav", "out/b.st", "--model", models["small"], "--codebooks", 2)
    run("decode", "out/a.st", "out/a.wav", "--model", models["small"], "--codebooks", 2)
    run("decode", "out/b.st", "out/b.wav", "--model", models["small"])
    assert Path("out/a.wav").read_bytes() == Path("out/b.wav").read_bytes()


# Printed output and plots


def test_jodio(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "whole.st", "--model", models["jodio"])
    run("encode", "in.wav", "stream.st", "--model", models["jodio"], "--stream")
    whole, stream = Tokens.load("whole.st"), Tokens.load("stream.st")
    assert (whole.codes == stream.codes).all() and whole.codes.shape == (5, 9)
    run("decode", "whole.st", "out.wav", "--model", models["jodio"])
    audio, rate = soundfile.read("out.wav")
    assert len(audio) == whole.length and rate == 24_000
    printed = run("info", models["jodio"]).stdout
    for part in ("8 channels, strides [4, 5, 6, 8, 2]", "3 layers of 20, 2 heads, then 2 layers of 12, 3 heads", "yes"):
        assert part in printed


@pytest.mark.slow
def test_info_shows_the_cost_of_the_architectures(here: Path) -> None:
    printed = run("info", "jodio").stdout
    assert printed == printed.replace("\x1b", "") and "mimi: both directions" in printed
    row = next(line for line in printed.splitlines() if "encoder.conv_blocks.0" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["6,000", "9.64", "375.72"]
    assert "386.24" in printed and "96.15" in printed and "GFLOP/s for matrix products in fp32" in printed


def test_info(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "a.st", "--packed", "--model", models["small"])
    shutil.copy(f"{models['small']}/model.safetensors", "alone.safetensors")
    tokens, size = Tokens.load("a.st"), Path("a.st").stat().st_size
    for source, expected in {
        "a.st": [tokens.fingerprint, models["small"], "0.45 kbps", "6 bits", "0.681 s", f"{size:,} bytes"],
        "in.wav": ["WAV FLOAT", "44100 Hz", "channels │ 2", "0.681 s", "30011 samples"],
        models["small"]: [
            tokens.fingerprint,
            "6, 1 of them semantic, of 64 entries",
            "12.5 a second",
            "M: encoder 0.",
        ],
        models["not_causal"]: ["cannot stream"],
        "alone.safetensors": [tokens.fingerprint],
    }.items():
        printed = run("info", source).stdout
        for part in expected:
            assert part in printed


def test_explain(here: Path) -> None:
    printed = run("explain", "--impl", "reference").stdout
    for op in fastmimi.runtime.ops.OPS:
        assert op in printed
    assert "asked for" in printed
    for device in ("cpu", "cuda"):
        printed = run("explain", "--device", device, "--dtype", "bfloat16").stdout
        assert f"{device}, bfloat16, impl=auto" in printed
        variant = f"cpu: the {fastmimi.runtime.dispatch.native_variant()} variant of the native kernels"
        assert (variant in printed) == (device == "cpu" and fastmimi.runtime.dispatch.native_variant() is not None)


def test_explain_a_model(here: Path, models: dict[str, str]) -> None:
    printed = run("explain", "--model", models["small"], "--impl", "reference").stdout
    assert f"{models['small']}, cpu, float32, impl=reference" in printed
    assert "window_attention in it: reference" in printed


@pytest.mark.slow
def test_info_takes_the_sources_of_the_model_option(here: Path) -> None:
    printed = run("info", "demo").stdout
    assert "demo" in printed and fastmimi.checkpoints.weights.fingerprint(fastmimi.load("demo")) in printed
    assert "random:7" in run("info", "random:7").stdout


@pytest.mark.slow
def test_plots_are_written(here: Path, models: dict[str, str]) -> None:
    common = "--model", models["small"]
    printed = run("roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--plot", "out/r.png", *common).stdout
    assert "picture  out/r.png" in printed
    run("encode", "in.wav", "out/b.st", "--plot", "out/e.svg", *common)
    run("decode", "out/a.st", "out/b.wav", "--plot", "out/d.pdf", *common)
    assert Path("out/r.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path("out/e.svg").read_bytes()
    assert Path("out/d.pdf").read_bytes().startswith(b"%PDF")
    assert Path("out/b.wav").read_bytes() == Path("out/a.wav").read_bytes()


def test_help_prints_every_text_unchanged() -> None:
    """Brackets are not parsed as markup: `fastmimi[train]`, `[jodio-]random[:seed]`."""
    group = typer.main.get_command(app)
    listed = without_layout(run("--help").stdout)
    for name, command in group.commands.items():
        printed = without_layout(run(name, "--help").stdout)
        assert without_layout(command.help) in listed and without_layout(command.help) in printed
        for parameter in command.params:
            assert without_layout(parameter.help or "") in printed
    assert "fastmimi[train]" in listed


def without_layout(text: str) -> str:
    """The text without white space, table borders and Markdown's backticks."""
    return re.sub(r"[\s│|`]", "", text)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fastmimi.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = 'torch', 'numpy', 'pydantic', 'transformers', 'matplotlib', 'soundfile'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    path = str(Path(fastmimi.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "[]\n", done.stderr
