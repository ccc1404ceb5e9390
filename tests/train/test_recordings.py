"""Recorded speech from Debian packages: which clips are taken, what is left of them, and what is written."""

import json
import subprocess

import numpy as np
import pytest
import soundfile
import soxr

from fastmimi.errors import InputError
from fastmimi.train import recordings
from fastmimi.train.recordings import RATE, Package, clips_of, collect, fetch, is_wide_band, join, without_silence

PACKAGE = Package("voices", "CC0", r"sounds/(?P<language>\w+)/(?P<voice>\w+)/[^/]+\.wav")


def speech(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """White noise, which is as wide as its rate, in syllables of a tenth of a second."""
    count = round(seconds * rate)
    syllables = 0.6 + 0.4 * np.sin(np.arange(count) / rate * 2 * np.pi * 5)
    return (np.random.default_rng(seed).standard_normal(count) * 0.1 * syllables).astype(np.float32)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with one unpacked package: two voices, one of them only as by telephone, and a broken file."""
    folder = tmp_path / "packages"
    for path, audio, rate in (
        ("en/ann/1.wav", speech(9), RATE),
        ("en/ann/2.wav", speech(9, seed=1), RATE),
        ("en/ann/3.wav", speech(3, 16_000), 16_000),
        ("fr/bob/1.wav", speech(2, 8_000), 8_000),
        ("fr/bob/2.wav", soxr.resample(speech(2, 8_000), 8_000, RATE), RATE),
    ):
        target = folder / "voices" / "sounds" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, audio, rate)
    (folder / "voices" / "sounds" / "en" / "ann" / "4.wav").write_bytes(b"no audio")
    monkeypatch.setattr(recordings, "PACKAGES", [PACKAGE])
    monkeypatch.setattr(recordings.shutil, "which", lambda program: program)
    return folder


def test_telephone_speech_is_not_wide_band_at_any_rate():
    assert is_wide_band(speech(1), RATE) and is_wide_band(speech(1, 16_000), 16_000)
    assert not is_wide_band(speech(1, 8_000), 8_000)
    assert not is_wide_band(soxr.resample(speech(1, 8_000), 8_000, RATE), RATE)
    assert not is_wide_band(speech(0.01), RATE)


def test_silence_goes_except_beside_sounds():
    gap = np.zeros(2 * RATE, np.float32)
    kept = without_silence(np.concatenate([gap, speech(1), gap, speech(1), gap]), RATE)
    assert len(kept) / RATE == pytest.approx(2 + 4 * recordings.PAUSE, abs=0.03)


@pytest.mark.parametrize("seconds", [0, 0.001, 0.1])
def test_of_silence_and_of_blips_nothing_is_left(seconds):
    assert not len(without_silence(np.zeros(round(seconds * RATE), np.float32), RATE))
    assert not len(without_silence(speech(seconds), RATE))


def test_a_clip_shorter_than_its_pauses_stays_whole():
    assert len(without_silence(speech(0.27), RATE)) == round(0.27 * RATE)


def test_clips_are_joined_until_a_file_is_long_enough():
    clips = [np.zeros(round(recordings.SECONDS * RATE * part)) for part in (0.5, 0.5, 0.9, 0.2, 0.1)]
    assert [len(group) for group in join(clips)] == [2, 2, 1]


def test_clips_have_the_language_and_voice_of_their_path(packages):
    clips = clips_of(PACKAGE, packages / "voices")
    assert [(clip.language, clip.voice) for clip in clips] == [("en", "ann")] * 4 + [("fr", "bob")] * 2
    with pytest.raises(InputError, match="holds no recordings of voices"):
        clips_of(PACKAGE, packages / "voices" / "sounds" / "fr")


def test_the_voices_of_debians_packages_are_told_apart(tmp_path):
    for name, path, expected in (
        ("asterisk-core-sounds-en-g722", "sounds/en_US_f_Allison/digits/1.g722", ("en", "en_US_f_Allison")),
        ("fillets-ng-data-cs", "sound/city/cs/vit-m-hlava.ogg", ("cs", "m")),
        ("klettres-data", "klettres/pt_BR/syllab/ba.ogg", ("pt_BR", "syllab")),
        ("ktuberling-data", "sounds/nn/hat.opus", ("nn", "nn")),
        ("tuxpaint-stamps-default", "stamps/animals/birds/blackbird_desc_ru.ogg", ("ru", "ru")),
    ):
        target = tmp_path / name / path
        target.parent.mkdir(parents=True)
        target.touch()
        package = next(package for package in recordings.PACKAGES if package.name == name)
        (clip,) = clips_of(package, tmp_path / name)
        assert (clip.language, clip.voice) == expected
    silence = tmp_path / "asterisk-core-sounds-en-g722/sounds/en_US_f_Allison/silence/1.g722"
    silence.parent.mkdir()
    silence.touch()
    assert len(clips_of(recordings.PACKAGES[0], tmp_path / recordings.PACKAGES[0].name)) == 1


@pytest.mark.slow
def test_files_manifest_and_summary_are_written(packages, tmp_path):
    entries = collect(tmp_path / "speech", packages, variants=2)
    assert [(e.file, e.variant, e.clips) for e in entries] == [
        ("voices-en-ann-0000-0.flac", 0, 2),
        ("voices-en-ann-0000-1.flac", 1, 2),
        ("voices-en-ann-0001-0.flac", 0, 1),
        ("voices-en-ann-0001-1.flac", 1, 1),
    ]
    listed = [json.loads(line) for line in (tmp_path / "speech" / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in listed] == [entry.file for entry in entries]
    assert {line["licence"] for line in listed} == {"CC0"}
    assert "| voices | CC0 | en | 1 | 3 | 0.01 |" in (tmp_path / "speech" / "README.md").read_text()
    sounds = {entry.file: soundfile.read(tmp_path / "speech" / entry.file)[0] for entry in entries}
    assert len(sounds["voices-en-ann-0000-0.flac"]) == 18 * RATE
    assert len(sounds["voices-en-ann-0000-1.flac"]) != 18 * RATE, "another pitch is another length"
    again = collect(tmp_path / "again", packages, variants=2)
    assert again == entries
    for name, audio in sounds.items():
        np.testing.assert_array_equal(soundfile.read(tmp_path / "again" / name)[0], audio)


def test_bad_arguments_and_missing_programs_are_one_sentence(packages, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"variants must lie in \[1, 1000\], got 0"):
        collect(tmp_path / "speech", packages, variants=0)
    monkeypatch.setattr(recordings.shutil, "which", lambda program: None if program == "ffmpeg" else program)
    with pytest.raises(InputError, match="ffmpeg is not installed"):
        collect(tmp_path / "speech", packages)
    assert not (tmp_path / "speech").exists()


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package voices\n")
    monkeypatch.setattr(recordings.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="the package voices could not be downloaded: E: Unable to locate"):
        fetch(PACKAGE, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())
