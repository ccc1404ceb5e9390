"""Errors of the command line: one line for a user's mistake, a traceback for a bug, and no partial files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi.checkpoints import weights
from fastmimi.cli import app, work
from fastmimi.devtools.testing import small_model
from fastmimi.io import transcode
from fastmimi.io.tokens import Tokens

RATE = 44_100


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small checkpoints: `a`, `b` with other weights, and some of other kinds."""
    kinds = {
        "a": small_model(),
        "b": small_model(seed=1),
        "not_causal": small_model("not_causal"),
        "rate": small_model(sampling_rate=48_000),
        "encoder": small_model(has_decoder=False),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, codec in kinds.items():
        weights.save_pretrained(codec, folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that holds `in.wav`, stereo, and `out/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "out").mkdir()
    write_noise(tmp_path / "in.wav")
    return tmp_path


def write_noise(path: Path, seconds: float = 0.6) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (round(seconds * RATE), 2))
    soundfile.write(path, samples, RATE, subtype="FLOAT")


def run(*args: object) -> None:
    """Run a command that must succeed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr


def refused(*args: object) -> str:
    """Run a command that must fail with exit code 2 and change nothing in out/; return its error message."""
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stdout == ""
    *notes, sentence = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert all(note.startswith("note: ") for note in notes)
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    return sentence


# Bad input


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


@pytest.mark.slow
def test_what_a_model_does_not_support_is_refused(here: Path, models: dict[str, str]) -> None:
    sentence = refused("roundtrip", "in.wav", "out/a.wav", "--stream", "--model", models["not_causal"])
    assert "this configuration cannot stream" in sentence
    run("encode", "in.wav", "out/a.st", "--model", models["encoder"])
    assert "which this model was made without" in refused(
        "decode", "out/a.st", "out/a.wav", "--model", models["encoder"]
    )


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
    tokens[-1] = 64  # one more than the largest code
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
    ("encode in.wav out/a.st --codebooks 7", "codebooks must be from 1 to 6, got 7"),
    ("encode in.wav out/a.st --codebooks 0", "codebooks must be from 1 to 6, got 0"),
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
    ("decode range.st out/a.wav", "codes must lie in [0, 64), got 64"),
    ("decode cut.safetensors out/a.wav", "cut.safetensors is a safetensors file, but not a token file"),
    ("decode ours.st out/a.wav --codebooks 7", "codebooks must be from 1 to 6, got 7"),
    ("decode ours.st ours.st", "cannot write ours.st"),
    ("decode ours.st out/a.txt", "its suffix must be one of"),
    ("info no.wav", "no.wav does not exist"),
    ("info text.wav", "text.wav is not an audio file"),
    ("info cut.st", "cut.st is not an audio file"),
    ("info cut.safetensors", "cut.safetensors is not a complete safetensors file"),
    ("info out", "out holds no model.safetensors"),
    ("info no/such", "cannot fetch 'no/such' from the hub"),
    ("explain --model no/such/model", "no model at 'no/such/model'"),
    ("explain --impl fast", "impl must be"),
    ("explain --dtype int8", "dtype must be float32, bfloat16 or float16, got 'int8'"),
    ("explode", "'explode'"),
    ("encode in.wav", "Missing argument 'OUT'; see"),
]


@pytest.fixture(scope="session")
def broken_inputs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("broken_inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_noise(folder / "in.wav")
        write_broken_inputs(folder, models["a"])
        (folder / "out").mkdir()
    return folder


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_users_mistake_is_an_error_of_one_line(
    broken_inputs: Path, models: dict[str, str], line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(broken_inputs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at its first import
    args = line.split()
    if "--model" not in args and args[0] in ("encode", "decode", "roundtrip"):
        args += ["--model", models["a"]]
    assert expected in refused(*args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_error_without_a_gpu(here: Path, models: dict[str, str]) -> None:
    sentence = refused("encode", "in.wav", "out/a.st", "--device", "cuda", "--model", models["a"])
    assert "device 'cuda' was asked for, and PyTorch finds only" in sentence


def test_an_error_leaves_existing_files_unchanged(here: Path, models: dict[str, str]) -> None:
    write_noise(here / "long.wav", 9)
    data = bytearray(Path("long.wav").read_bytes())
    data[-4:] = np.float32("nan").tobytes()  # found after most of the file has been encoded
    Path("long.wav").write_bytes(data)
    for name in ("a.wav", "a.st", "a.png"):
        Path("out", name).write_text("old")
    args = "--tokens", "out/a.st", "--plot", "out/a.png", "--stream", "--model", models["a"]
    assert "holds nan" in refused("roundtrip", "long.wav", "out/a.wav", *args)


@pytest.mark.parametrize("line", ["np.zeros(3) + np.zeros(4)", "torch.zeros(3) @ torch.zeros(4)", "int('three')"])
def test_a_bug_keeps_its_traceback(
    here: Path, models: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no partial file."""
    module = {"__name__": "fastmimi.buggy", "np": np, "torch": torch}
    exec(f"def decode(*args, **options): {line}", module)
    monkeypatch.setattr(transcode, "decode", module["decode"])
    args = ["roundtrip", "in.wav", "out/a.wav", "--tokens", "out/a.st", "--model", models["a"]]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, ValueError | RuntimeError)
    assert result.exit_code == 1
    assert "error: " not in result.stderr
    assert os.listdir("out") == []


def test_an_interruption_leaves_no_files(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert len(os.listdir("out")) == 1  # the temporary file with part of the audio
        raise KeyboardInterrupt

    monkeypatch.setattr(work.AudioWriter, "write", interrupted)
    result = CliRunner().invoke(app, ["roundtrip", "in.wav", "out/a.wav", "--model", models["a"]])
    assert result.exit_code == 130
    assert result.stderr.endswith("\ninterrupted\n")
    assert os.listdir("out") == []


# In processes of their own


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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_files(here: Path, models: dict[str, str], number: int, code: int) -> None:
    run("encode", "in.wav", "a.st", "--model", models["a"])
    long = np.zeros((6, 20_000), int)
    replace(Tokens.load("a.st"), codes=long, length=1920 * long.shape[1]).save("long.st")
    # Processes that a shell starts in the background (`make test &`) ignore SIGINT, and so do their children.
    unignored = partial(signal.signal, number, signal.SIG_DFL)
    process = start("decode", "long.st", "out/a.wav", "--stream", "--model", models["a"], preexec_fn=unignored)
    while not os.listdir("out"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert os.listdir("out") == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_a_full_disk_leaves_no_files(here: Path, models: dict[str, str]) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    process = start("roundtrip", "in.wav", "out/a.wav", "--model", models["a"], preexec_fn=limit)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr.startswith("note: in.wav has 2 channels")
    assert "is the disk full?" in stderr
    assert os.listdir("out") == []


def test_without_matplotlib_the_error_says_what_to_install(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    sentence = refused("encode", "in.wav", "out/a.st", "--plot", "out/a.png", "--model", models["a"])
    assert sentence == "error: plots need matplotlib: pip install 'fastmimi[plot]'"
