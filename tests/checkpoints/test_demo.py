"""The demonstration model that comes with the package: its size, its quality, and that it loads like any Mimi."""

import json
import re
import zlib
from pathlib import Path

import pytest
import soundfile
import soxr
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi.checkpoints.weights import DEMO
from fastmimi.cli import app
from fastmimi.train.evaluate import audio_files, evaluate, measures

CLIPS = [
    *(Path(__file__).resolve().parents[1] / "data" / "audio").glob("*.ogg"),
    DEMO.parent / "198-209-0000.ogg",
]


@pytest.fixture(scope="module")
def demo():
    return fastmimi.load("demo")


def clip(path, seconds=None):
    audio, rate = soundfile.read(path, dtype="float32")
    audio = soxr.resample(audio, rate, 24_000)
    return torch.from_numpy(audio[: None if seconds is None else int(seconds * 24_000)])[None, None]


@pytest.mark.slow
def test_real_speech_is_intelligible(demo):
    """STOI of speakers that are not in the training data is the published one, up to rounding."""
    published = json.loads((DEMO / "evaluation.json").read_text())["files"]
    assert len(CLIPS) == 3
    for path in CLIPS:
        audio = clip(path)
        for count in (8, demo.total_codebooks):
            decoded = demo.decode(demo.encode(audio, num_codebooks=count))[..., : audio.shape[-1]]
            stoi = measures(audio, decoded, 24_000)["stoi"]
            known = [row["stoi"] for row in published if (row["file"], row["codebooks"]) == (path.name, count)]
            assert known == [pytest.approx(stoi, abs=0.005)] and stoi > 0.8


def test_it_is_small_and_has_mimis_frame_rate_and_codebook_size(demo):
    assert len(zlib.compress((DEMO / "model.safetensors").read_bytes())) <= 12e6  # as in a wheel
    assert (demo.sample_rate, demo.frame_rate, demo.frame_size) == (24_000, 12.5, 1920)
    assert demo.total_codebooks == 16 and demo.config.codebook_size == 2048
    assert demo.config.num_semantic_quantizers == 1


def test_the_record_of_its_training():
    stages = json.loads((DEMO / "training.json").read_text())
    names = [Path(stage["configuration"]["out"]).name for stage in stages]
    earlier = ["demo", "demo_finish", "demo_further", "demo_wide", "demo_wide_finish"]
    assert names == [*earlier, "demo_spectrum", "demo_spectrum_further"]
    assert all((DEMO.parents[1] / "train" / f"{name}.yaml").exists() for name in names)
    assert all(stage["steps"] == stage["configuration"]["steps"] for stage in stages)
    assert (DEMO / "training.png").stat().st_size > 10_000


def test_streaming_equals_one_call(demo):
    audio = clip(CLIPS[0], 2.0)
    state = demo.new_state()
    codes = torch.cat([demo.encode(chunk, state=state) for chunk in audio.split(5000, dim=-1)], dim=-1)
    assert torch.equal(codes, demo.encode(audio))
    whole = demo.decode(codes)
    streamed = torch.cat([demo.decode(chunk, state=state) for chunk in codes.split(3, dim=-1)], dim=-1)
    assert (streamed - whole).abs().max() < 1e-5


def test_transformers_loads_it_and_gives_the_same_results(demo, tmp_path):
    """With trained weights there are no near ties in the search: all codes are equal."""
    import transformers

    fastmimi.save_pretrained(demo, tmp_path)  # the package's file may hold int8 and scales
    peer = transformers.MimiModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    audio = clip(CLIPS[0], 4.0)
    with torch.no_grad():
        codes = peer.encode(audio, num_quantizers=16).audio_codes
        sound = peer.decode(codes).audio_values
    assert torch.equal(demo.encode(audio), codes)
    assert (demo.decode(codes)[..., : sound.shape[-1]] - sound).abs().max() < 1e-5


def test_the_command_line_notes_that_it_is_a_demonstration_model(tmp_path):
    soundfile.write(tmp_path / "a.wav", clip(CLIPS[0], 0.5)[0, 0].numpy(), 24_000)
    arguments = ["roundtrip", str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), "--model", "demo"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "demo is a small demonstration model" in result.stderr
    assert "--model kyutai/mimi" in result.stderr and "quality" not in result.stdout


def test_the_command_line_shows_the_published_quality_of_its_clip(tmp_path):
    """The figures are those that `evaluate` gives for the shipped weights."""
    path = DEMO.parent / "198-209-0000.ogg"
    result = CliRunner().invoke(app, ["roundtrip", str(path), str(tmp_path / "b.wav"), "--model", "demo"])
    [row] = evaluate(fastmimi.load("demo"), "demo", audio_files(path), [8]).files
    shown = re.search(r"8 codebooks, as published: STOI (.*), ESTOI (.*), PESQ (.*), SI-SDR (.*) dB", result.stdout)
    *scores, si_sdr = map(float, shown.groups())
    assert scores == pytest.approx([row.stoi, row.estoi, row.pesq], abs=0.01)  # two decimals are shown
    assert si_sdr == pytest.approx(row.si_sdr, abs=0.06)  # one
