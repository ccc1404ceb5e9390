"""The command line: results, equal however they are reached, and errors that are one sentence and leave nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

import fastmimi
from fastmimi import plot, transcode, weights
from fastmimi.cli import app, errors, work
from fastmimi.config import CodecConfig
from fastmimi.tokens import Tokens

CLIP = Path(fastmimi.__file__).parent / "assets" / "198-209-0000.ogg"
TINY = {
    "num_filters": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 32,
    "num_quantizers": 8,
    "codebook_size": 100,
}
RATE = 44_100
FRAMES = 30_011  # of the sound at that rate: 16_333 samples at 24 kHz, 8.5 frames of codes


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny checkpoints: `a`, `b` with other weights, and some of other kinds."""
    kinds = {
        "a": ({}, 0),
        "b": ({}, 1),
        "stereo": ({"audio_channels": 2}, 0),
        "centred": ({"use_causal_conv": False}, 0),
        "rate": ({"sampling_rate": 48_000}, 0),
        "encoder": ({"has_decoder": False}, 0),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, (change, seed) in kinds.items():
        weights.save_pretrained(weights.random(CodecConfig(**{**TINY, **change}), seed), folder / name)
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
    time = np.arange(frames)[:, None] / rate
    tone = 0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time + np.arange(channels))
    tone += np.random.default_rng(0).normal(0, 0.05, tone.shape)
    soundfile.write(path, tone, rate, subtype="FLOAT" if path.suffix == ".wav" else None)


def run(*args: object) -> Result:
    """A command that succeeds."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*args: object) -> str:
    """The sentence of a command that a user's mistake ends; it leaves nothing in out/."""
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stdout == ""
    *notes, sentence = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert all(note.startswith("note: ") for note in notes)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    return sentence


def codes_of(path: str) -> np.ndarray:
    return Tokens.load(path).codes


# Equal, however


def test_every_way_gives_the_same(here: Path, models: dict[str, str]) -> None:
    common = "--model", models["a"]
    run("roundtrip", "in.wav", "out/whole.wav", "--tokens", "out/whole.st", *common)
    run("roundtrip", "in.wav", "out/stream.wav", "--tokens", "out/stream.st", "--stream", *common)
    run("encode", "in.wav", "out/encoded.st", *common)
    run("encode", "in.wav", "out/packed.st", "--packed", *common)
    run("decode", "out/packed.st", "out/decoded.wav", *common)
    run("decode", "out/encoded.st", "out/decoded-stream.wav", "--stream", *common)
    whole = Tokens.load("out/whole.st")
    assert whole.codes.shape == (8, 9)
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


def test_it_is_what_the_model_gives(here: Path, models: dict[str, str]) -> None:
    write_sound(here / "in.flac", rate=24_000, channels=1)
    samples = soundfile.read("in.flac", dtype="float32")[0]
    codec = weights.load(models["a"])
    codes = codec.encode(torch.from_numpy(samples)[None, None], num_codebooks=3)
    audio = codec.decode(codes)[0, 0, :FRAMES]
    run("roundtrip", "in.flac", "out/a.mat5", "--tokens", "out/a.st", "--codebooks", 3, "--model", models["a"])
    tokens = Tokens.load("out/a.st")
    np.testing.assert_array_equal(tokens.codes, codes[0])
    assert tokens.fingerprint == weights.fingerprint(codec)
    assert (tokens.model, tokens.length, tokens.packed) == (models["a"], FRAMES, False)
    np.testing.assert_allclose(soundfile.read("out/a.mat5")[0], audio, atol=1e-5)


def test_real_speech_whole_and_as_a_stream(here: Path) -> None:
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
    run("roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--model", models["a"], *["--stream"] * stream)
    assert codes_of("out/a.st").shape == (8, -(-frames // 1920))
    assert soundfile.info("out/a.wav").frames == frames


def test_other_kinds_of_models(here: Path, models: dict[str, str]) -> None:
    run("roundtrip", "in.wav", "out/stereo.wav", "--model", models["stereo"])
    assert soundfile.info("out/stereo.wav").channels == 2
    run("roundtrip", "in.wav", "out/centred.wav", "--tokens", "out/c.st", "--model", models["centred"])
    assert codes_of("out/c.st").shape == (8, 9)
    assert "cannot stream" in refused("roundtrip", "in.wav", "out/x.wav", "--stream", "--model", models["centred"])
    run("roundtrip", "in.wav", "out/rate.wav", "--model", models["rate"])
    assert soundfile.info("out/rate.wav").samplerate == 48_000
    run("encode", "in.wav", "out/e.st", "--model", models["encoder"])
    assert "without" in refused("decode", "out/e.st", "out/x.wav", "--model", models["encoder"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(here: Path, models: dict[str, str], dtype: str) -> None:
    run("roundtrip", "in.wav", "out/a.wav", "--model", models["a"], "--dtype", dtype)
    assert np.abs(soundfile.read("out/a.wav")[0]).max() > 0


def test_a_stream_is_not_read_ahead(models: dict[str, str]) -> None:
    """The model has taken each block before the next but one is read: memory does not grow with the length."""
    codec, clock = weights.load(models["a"]), transcode.Clock()
    seen = []

    def blocks():
        for _ in range(6):
            seen.append(clock.steps)
            yield np.zeros((transcode.STEP_FRAMES * 1920, 1), np.float32)

    codes = transcode.encode(codec, blocks(), clock)
    assert seen == [0, 1, 2, 3, 4, 5]
    decoded = transcode.decode(codec, codes, 1920 * codes.shape[1], clock)
    assert next(decoded).shape == (transcode.STEP_FRAMES * 1920, 1)
    assert clock.steps == 7


def test_frame_by_frame_is_a_step_for_each_frame(models: dict[str, str]) -> None:
    codec, clock = weights.load(models["a"]), transcode.Clock()
    codes = transcode.encode(codec, [np.zeros((5_000, 1), np.float32)], clock, frame_by_frame=True)
    assert clock.steps == 4  # two frames, the rest that is held back, the flush
    blocks = [*transcode.decode(codec, codes, 5_000, clock, frame_by_frame=True)]
    assert [len(block) for block in blocks] == [1920, 1920, 1160]


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_rechunk(size: int) -> None:
    samples = np.arange(50)[:, None]
    blocks = [samples[:0], samples[:7], samples[7:8], samples[8:40], samples[40:]]
    found = [*transcode.rechunk(iter(blocks), size)]
    np.testing.assert_array_equal(np.concatenate(found), samples)
    assert {len(block) for block in found[:-1]} <= {size}
    assert len(found[-1]) <= size


# Weights that differ


def test_other_weights_are_refused_unless_forced(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "out/a.st", "--model", models["a"])
    sentence = refused("decode", "out/a.st", "out/b.wav", "--model", models["b"])
    tokens, other = Tokens.load("out/a.st"), weights.fingerprint(weights.load(models["b"]))
    for part in (models["a"], models["b"], tokens.fingerprint, other, "--force"):
        assert part in sentence
    run("decode", "out/a.st", "out/b.wav", "--model", models["b"], "--force")
    assert soundfile.info("out/b.wav").frames == tokens.length
    sentence = refused("decode", "out/a.st", "out/c.wav", "--model", models["rate"], "--force")
    assert "24000 Hz" in sentence
    assert "48000 Hz" in sentence


def test_fewer_codebooks_are_decoded(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "out/a.st", "--model", models["a"])
    run("encode", "in.wav", "out/b.st", "--model", models["a"], "--codebooks", 2)
    run("decode", "out/a.st", "out/a.wav", "--model", models["a"], "--codebooks", 2)
    run("decode", "out/b.st", "out/b.wav", "--model", models["a"])
    assert Path("out/a.wav").read_bytes() == Path("out/b.wav").read_bytes()


# Bad input


def write_broken_inputs(folder: Path, model: str) -> None:
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio" * 100)
    samples = soundfile.read(folder / "in.wav")[0]
    soundfile.write(folder / "none.wav", samples[:0], RATE)
    for name, value in (("nan", np.nan), ("inf", -np.inf)):
        samples[777, 1] = value
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="FLOAT")
    run("encode", "in.wav", "ours.st", "--model", model)
    for name, source in (
        ("cut.wav", "in.wav"),
        ("cut.st", "ours.st"),
        ("cut.safetensors", f"{model}/model.safetensors"),
    ):
        data = Path(source).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    tokens = bytearray(Path("ours.st").read_bytes())
    tokens[-1] = 100  # one more than the last entry
    (folder / "range.st").write_bytes(tokens)
    (folder / "pickle.pt").write_bytes(b"\x80\x02")


BAD = [
    ("encode no.wav out/a.st", "no.wav does not exist"),
    ("encode empty.wav out/a.st", "empty.wav is empty"),
    ("encode text.wav out/a.st", "text.wav is not an audio file"),
    ("encode cut.wav out/a.st", "cut.wav is truncated"),
    ("encode none.wav out/a.st", "none.wav holds no samples"),
    ("encode nan.wav out/a.st", "nan.wav holds nan at sample 777"),
    ("encode out out/a.st", "out is not a file"),
    ("roundtrip inf.wav out/a.wav --tokens out/a.st --plot out/a.png", "inf.wav holds -inf at sample 777"),
    ("encode in.wav no/a.st", "cannot write no/a.st: there is no directory no"),
    ("encode in.wav out", "cannot write out: it is a directory"),
    ("encode in.wav in.wav", "cannot write in.wav: in.wav is the same file"),
    ("roundtrip in.wav out/a.wav --tokens out/../out/a.wav", "is the same file"),
    ("encode in.wav cut.safetensors --model cut.safetensors", "is the same file"),
    ("roundtrip in.wav out/a.xyz", "cannot write out/a.xyz: its suffix must be one of"),
    ("roundtrip in.wav out/a", "got ''"),
    ("roundtrip in.wav out/a.wav --plot out/a.doc", "cannot draw out/a.doc: its suffix must be one of"),
    ("encode in.wav out/a.st --codebooks 9", "codebooks must be from 1 to 8, got 9"),
    ("encode in.wav out/a.st --codebooks 0", "codebooks must be from 1 to 8, got 0"),
    ("encode in.wav out/a.st --codebooks many", "--codebooks"),
    ("encode in.wav out/a.st --device abacus", "device must be cpu, cuda, cuda:1..., got 'abacus'"),
    ("encode in.wav out/a.st --device meta", "device 'meta' was asked for"),
    ("encode in.wav out/a.st --dtype float7", "dtype must be float32, bfloat16 or float16, got 'float7'"),
    ("encode in.wav out/a.st --impl fast", "impl must be"),
    ("encode in.wav out/a.st --impl fast --model no/such", "impl must be"),
    ("encode in.wav out/a.st --no-such-option", "--no-such-option"),
    ("encode in.wav out/a.st --model cut.safetensors", "cut.safetensors is not a complete safetensors file"),
    ("encode in.wav out/a.st --model pickle.pt", "pickle.pt is not a .safetensors file"),
    ("encode in.wav out/a.st --model no/such/model", "no model at 'no/such/model'"),
    ("encode in.wav out/a.st --model no/such", "cannot fetch 'no/such' from the hub"),
    ("encode in.wav out/a.st --model in.wav", "in.wav is not a .safetensors file"),
    ("decode no.st out/a.wav", "no.st does not exist"),
    ("decode in.wav out/a.wav", "in.wav is not a safetensors file"),
    ("decode cut.st out/a.wav", "cut.st is not a safetensors file, or is truncated"),
    ("decode range.st out/a.wav", "codes must lie in [0, 100), got 100"),
    ("decode cut.safetensors out/a.wav", "cut.safetensors is a safetensors file, but not one of tokens"),
    ("decode ours.st out/a.wav --codebooks 9", "codebooks must be from 1 to 8, got 9"),
    ("decode ours.st ours.st", "cannot write ours.st"),
    ("decode ours.st out/a.txt", "its suffix must be one of"),
    ("info no.wav", "no.wav does not exist"),
    ("info text.wav", "text.wav is not an audio file"),
    ("info cut.safetensors", "cut.safetensors is not a complete safetensors file"),
    ("info out", "out holds no model.safetensors"),
    ("explain --impl fast", "impl must be"),
    ("explain --dtype int8", "dtype must be float32, bfloat16 or float16, got 'int8'"),
    ("explode", "'explode'"),
    ("encode in.wav", "Missing argument 'OUT'; see"),
]


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_sound(folder / "in.wav")
        write_broken_inputs(folder, models["a"])
        (folder / "out").mkdir()
    return folder


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_sentence(
    broken: Path, models: dict[str, str], line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(broken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = line.split()
    if "--model" not in args and args[0] in ("encode", "decode", "roundtrip"):
        args += ["--model", models["a"]]
    assert expected in refused(*args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants to be absent")
def test_a_gpu_that_is_not_there(here: Path, models: dict[str, str]) -> None:
    sentence = refused("encode", "in.wav", "out/a.st", "--device", "cuda", "--model", models["a"])
    assert "device 'cuda' was asked for, and PyTorch finds only" in sentence


def test_an_existing_target_survives_a_mistake(here: Path, models: dict[str, str]) -> None:
    write_sound(here / "long.wav", 10 * RATE)
    data = bytearray(Path("long.wav").read_bytes())
    data[-4:] = np.float32("nan").tobytes()  # noticed when most has been encoded
    Path("long.wav").write_bytes(data)
    for name in ("a.wav", "a.st", "a.png"):
        Path("out", name).write_text("old")
    args = "--tokens", "out/a.st", "--plot", "out/a.png", "--stream", "--model", models["a"]
    assert "holds nan" in refused("roundtrip", "long.wav", "out/a.wav", *args)


@pytest.mark.parametrize("line", ["np.zeros(3) + np.zeros(4)", "torch.zeros(3) @ torch.zeros(4)", "int('three')"])
def test_a_bug_of_ours_is_no_sentence(
    here: Path, models: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it leaves nothing behind either."""
    module = {"__name__": "fastmimi.buggy", "np": np, "torch": torch}
    exec(f"def decode(*args, **options): {line}", module)
    monkeypatch.setattr(transcode, "decode", module["decode"])
    args = ["roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--model", models["a"]]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, ValueError | RuntimeError)
    assert result.exit_code == 1
    assert "error: " not in result.stderr
    assert os.listdir("out") == []


def test_who_raised_an_error() -> None:
    def caught(function, *args) -> BaseException:
        with pytest.raises((ValueError, RuntimeError)) as info:
            function(*args)
        return info.value

    assert errors.raised_by_us(caught(fastmimi.dispatch.check_impl, "fast"))
    assert errors.raised_by_us(caught(weights.load, "no/such/model"))
    assert not errors.raised_by_us(caught(int, "three"))
    assert not errors.raised_by_us(caught(weights.random, CodecConfig(**TINY), "seed"))


def test_an_interruption_leaves_nothing(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert len(os.listdir("out")) == 1  # half of the audio
        raise KeyboardInterrupt

    monkeypatch.setattr(work.AudioWriter, "write", interrupted)
    result = CliRunner().invoke(app, ["roundtrip", "in.wav", "out/a.wav", "--model", models["a"]])
    assert result.exit_code == 130
    assert result.stderr.endswith("\ninterrupted\n")
    assert os.listdir("out") == []


# Real processes


def start(*args: object, **options: object) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(fastmimi.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "fastmimi", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(here: Path, models: dict[str, str], number: int, code: int) -> None:
    run("encode", "in.wav", "a.st", "--model", models["a"])
    long = np.zeros((8, 20_000), int)
    replace(Tokens.load("a.st"), codes=long, length=1920 * long.shape[1]).save("long.st")
    process = start("decode", "long.st", "out/a.wav", "--stream", "--model", models["a"])
    while not os.listdir("out"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert os.listdir("out") == []


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_a_full_disk_leaves_nothing(here: Path, models: dict[str, str]) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    process = start("roundtrip", "in.wav", "out/a.wav", "--model", models["a"], preexec_fn=limit)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr.startswith("note: in.wav has 2 channels")
    assert "is the disk full?" in stderr
    assert os.listdir("out") == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fastmimi.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'matplotlib', 'soundfile') if name in sys.modules])"
    )
    path = str(Path(fastmimi.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "[]\n", done.stderr


# What is printed, and drawn


def test_info(here: Path, models: dict[str, str]) -> None:
    run("encode", "in.wav", "a.safetensors", "--packed", "--model", models["a"])
    shutil.copy(f"{models['a']}/model.safetensors", "alone.safetensors")
    tokens, size = Tokens.load("a.safetensors"), Path("a.safetensors").stat().st_size
    for source, expected in {
        "a.safetensors": [tokens.fingerprint, models["a"], "0.70 kbps", "7 bits", "0.681 s", f"{size:,} bytes"],
        "in.wav": ["WAV FLOAT", "44100 Hz", "channels │ 2", "0.681 s", "30011 samples"],
        models["a"]: [
            tokens.fingerprint,
            "8, 1 of them semantic, of 100 entries",
            "12.5 a second",
            "M: encoder 0.06 M",
        ],
        models["centred"]: ["cannot stream"],
        "alone.safetensors": [tokens.fingerprint],
    }.items():
        printed = run("info", source).stdout
        for part in expected:
            assert part in printed


def test_explain(here: Path) -> None:
    printed = run("explain", "--impl", "reference").stdout
    for op in fastmimi.ops.OPS:
        assert op in printed
    assert "asked for" in printed
    for device in ("cpu", "cuda"):
        printed = run("explain", "--device", device, "--dtype", "bfloat16").stdout
        assert f"{device}, bfloat16, impl=auto" in printed


def test_pictures_are_drawn(here: Path, models: dict[str, str]) -> None:
    common = "--model", models["a"]
    printed = run("roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--plot", "out/r.png", *common).stdout
    assert "picture  out/r.png" in printed
    run("encode", "in.wav", "out/b.st", "--plot", "out/e.svg", *common)
    run("decode", "out/a.st", "out/b.wav", "--plot", "out/d.pdf", *common)
    assert Path("out/r.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path("out/e.svg").read_bytes()
    assert Path("out/d.pdf").read_bytes().startswith(b"%PDF")
    assert Path("out/b.wav").read_bytes() == Path("out/a.wav").read_bytes()


def test_without_matplotlib_it_says_what_to_install(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    sentence = refused("encode", "in.wav", "out/a.st", "--plot", "out/a.png", "--model", models["a"])
    assert sentence == "error: pictures need matplotlib: pip install 'fastmimi[plot]'"


def test_a_picture_shows_the_beginning_of_long_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = plot.Track(limit=30 * 24_000)
    blocks = [np.full((24_000, 2), i, np.float32) for i in range(40)]
    assert all(a is b for a, b in zip(track.tee(blocks), blocks, strict=True))
    assert track.total == 40 * 24_000
    np.testing.assert_array_equal(track.audio, np.repeat(np.arange(30), 24_000))
    facts = {"sample_rate": 24_000, "frame_size": 1920, "codebook_size": 100, "title": "a.wav"}
    plot.draw(tmp_path / "a.svg", "svg", np.zeros((8, 500), int), {"original": track.audio}, **facts)
    assert "a.wav (the first 30 of 40.0 s)" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("samples", [1, 2, 1919, 50_000])
def test_pictures_of_any_length(tmp_path: Path, samples: int) -> None:
    facts = {"sample_rate": 24_000, "frame_size": 1920, "codebook_size": 100, "title": "a.wav"}
    codes = np.zeros((1, max(1, -(-samples // 1920))), int)
    plot.draw(tmp_path / "a.png", "png", codes, {"decoded": np.zeros(samples, np.float32)}, **facts)
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_a_tone_stands_where_it_sounds() -> None:
    rate, hz = 24_000, 1_000.0
    tone = 0.5 * np.sin(2 * np.pi * hz * np.arange(rate) / rate)
    image = plot.spectrogram(tone, rate)
    row = image[:, image.shape[1] // 2].argmax()
    mel = 2595 * np.log10(1 + np.array([hz, rate / 2]) / 700)
    assert row / (len(image) - 1) == pytest.approx(mel[0] / mel[1], abs=1 / len(image))
    assert image.max() == pytest.approx(20 * np.log10(0.5), abs=1.5)
