"""Objective quality metrics, and the command that prints them."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi.cli import app
from fastmimi.devtools.testing import noise, small_model
from fastmimi.train.evaluate import audio_files, evaluate, measures, si_sdr, usage_from_histograms

CLIP = "fastmimi/assets/198-209-0000.ogg"


@pytest.fixture(scope="module")
def clip(request):
    audio, rate = soundfile.read(request.config.rootpath / CLIP, frames=16_000 * 3, dtype="float32")
    return audio, rate


def test_si_sdr_is_invariant_to_scale():
    draw = np.random.default_rng(0)
    signal, noise = draw.standard_normal((2, 100_000))
    assert si_sdr(signal, 7 * (signal + 0.1 * noise)) == pytest.approx(20, abs=0.1)
    assert si_sdr(signal, signal) > 100 and si_sdr(np.zeros(9), signal[:9]) is None


def test_si_sdr_of_silence_is_none():
    sound = noise(1000).numpy()
    assert si_sdr(sound, sound * 0) is None and si_sdr(sound * 0, sound) is None


def test_metrics_of_a_copy_are_perfect_and_of_a_noisy_copy_are_not(clip):
    audio, rate = torch.from_numpy(clip[0])[None, None], clip[1]
    copy = measures(audio, audio, rate)
    assert copy["mel"] == 0 and copy["stoi"] == pytest.approx(1) and copy["estoi"] == pytest.approx(1)
    assert copy["pesq"] > 4.5
    worse = measures(audio, audio + 0.05 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(0)), rate)
    assert worse["mel"] > 0.1 and worse["stoi"] < 0.99 and worse["estoi"] < worse["stoi"] and worse["pesq"] < 2


def test_undefined_metrics_of_silence_and_short_audio_are_none():
    silence = torch.zeros(1, 1, 24_000)
    found = measures(silence, silence, 24_000)
    assert found["si_sdr"] is None and found["pesq"] is None and found["mel"] == 0
    assert found["stoi"] is None and found["estoi"] is None
    blip = torch.zeros(1, 1, 48_000)
    blip[..., 4000:8000] = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert measures(blip, blip, 24_000)["stoi"] is None
    short = measures(torch.ones(1, 1, 100), torch.ones(1, 1, 100), 24_000)
    assert short["mel"] is None and short["stoi"] is None


@pytest.mark.slow
def test_speech_of_many_phrases_has_a_pesq():
    """The library has buffers for 50 utterances, and crashes with more."""
    draw = np.random.default_rng(0)
    phrase = np.concatenate([draw.standard_normal(12_000) * 0.1, np.zeros(16_000)])
    audio = torch.from_numpy(np.tile(phrase, 70).astype(np.float32))[None, None]
    hiss = torch.from_numpy(draw.standard_normal(audio.shape).astype(np.float32))
    assert 1 <= measures(audio, audio + 0.001 * hiss, 16_000)["pesq"] <= 4.65


def test_usage_from_histograms():
    histograms = np.array([[5, 5, 5, 5], [10, 0, 0, 0], [8, 8, 0, 0]])
    found = usage_from_histograms(histograms)
    assert [level.used for level in found] == [1.0, 0.25, 0.5]
    assert [level.perplexity for level in found] == pytest.approx([4, 1, 2])


def test_files_are_compared_with_their_decoded_codes(tmp_path, clip):
    codec = small_model()
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", clip[0][i * 16_000 : (i + 1) * 16_000], clip[1])
    recorded = {}
    found = evaluate(codec, "small", audio_files(tmp_path), [2, 6], lambda name, *rest: recorded.update({name: rest}))
    assert [(r.file, r.codebooks) for r in found.files] == [("0.wav", 2), ("0.wav", 6), ("1.wav", 2), ("1.wav", 6)]
    codes, sounds = recorded["1.wav"]
    assert sounds.keys() == {"original", "2 codebooks", "6 codebooks"}
    audio = torch.from_numpy(sounds["original"])[None, None]
    assert torch.equal(codec.encode(audio)[0], torch.from_numpy(codes))
    decoded = codec.decode(codec.encode(audio))[..., : audio.shape[-1]]
    assert found.files[3].mel == pytest.approx(measures(audio, decoded, 24_000)["mel"])
    assert found.means[1].stoi == pytest.approx(sum(r.stoi for r in found.files[1::2]) / 2)
    assert len(found.usage) == 6 and all(0 < level.used <= 1 for level in found.usage)


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_evaluate_command(tmp_path, clip):
    fastmimi.save_pretrained(small_model(), tmp_path / "model")
    for name in ("audio/a.flac", "audio/deep/a.flac"):
        (tmp_path / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / name, clip[0], clip[1])
    arguments = ["--model", tmp_path / "model", "--json", tmp_path / "a.json", "--plot", tmp_path / "pictures"]
    code, output = run(tmp_path / "audio", *arguments, "--codebooks", "1", "--codebooks", "6")
    assert code == 0 and "deep/a.flac" in output and "mean of 2" in output and "perplexity of each codebook" in output
    written = json.loads((tmp_path / "a.json").read_text())
    assert [r["codebooks"] for r in written["means"]] == [1, 6] and math.isfinite(written["means"][1]["stoi"])
    pictures = {str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.png")}
    assert pictures == {"a.flac.png", "deep/a.flac.png", "codebooks.png"}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["none"], "none holds no audio files"),
        (["audio", "--codebooks", "33"], "codebooks must lie in [1, 6] for model, got 33"),
        (["audio", "--model", "none", "--plot", "pictures"], "no model at 'none'"),
        (["bad", "--plot", "pictures"], "bad/b.wav is not an audio file"),
        (["audio", "--json", "nowhere/a.json"], "cannot write nowhere/a.json: there is no directory nowhere"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    fastmimi.save_pretrained(small_model(), tmp_path / "model")
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.flac", np.zeros(24_000), 24_000)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.wav").write_bytes(b"RIFF")
    code, output = run("--model", "model", *arguments)
    assert code == 2 and sentence in " ".join(output.split())
    assert not (tmp_path / "pictures").exists()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    from fastmimi.cli import training

    monkeypatch.setattr(training, "REQUIRED_PACKAGES", ("numpy", "no_such_package"))
    code, output = run(tmp_path)
    assert code == 2 and "need no_such_package: pip install 'fastmimi[train]'" in output
