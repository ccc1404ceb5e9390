"""Audio files: every format, rate and channel count is read and written; truncated and damaged files are refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmimi.io import audio

RATE = 24_000
LOSSY = {"mp3", "ogg", "oga", "opus"}
WRITTEN = re.findall(
    r"\w+",
    "aif aifc aiff au avr caf flac ircam mat4 mat5 mp3 mpc2k nist oga ogg opus paf pvf rf64 snd svx voc w64 wav wave "
    "wavex",
)


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """[samples, channels] float32 in [-0.5, 0.5]."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)


def read(path: Path, rate: int = RATE, channels: int = 1) -> np.ndarray:
    return np.concatenate([*audio.read_blocks(audio.probe(path), rate, channels)])


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> audio.AudioWriter:
    with audio.AudioWriter(path, audio.output_format(path), rate, samples.shape[1]) as writer:
        for start in range(0, len(samples), 7_000):
            writer.write(samples[start : start + 7_000])
    return writer


# Reading


@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_written_format_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    samples = noise(2 * RATE + 77)
    write(path, samples)
    found = audio.probe(path)
    assert (found.sample_rate, found.channels, found.frames) == (RATE, 1, len(samples))
    assert found.duration == len(samples) / RATE
    back = read(path)
    assert back.shape == samples.shape
    if suffix in LOSSY:  # white noise correlates with itself only without any shift
        assert np.corrcoef(samples[:, 0], back[:, 0])[0, 1] > 0.5
    else:
        assert np.abs(back - samples).max() < 1e-4


def test_the_error_lists_the_formats_that_can_be_written() -> None:
    with pytest.raises(ValueError, match="must be one of") as error:
        audio.output_format("a.xyz")
    assert re.search("one of (.*), got", str(error.value))[1].split(", ") == WRITTEN


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
def test_concatenated_blocks_equal_the_whole_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """soundfile's own `blocks` fails for MP3, because it seeks between them."""
    path = tmp_path / f"a.{suffix}"
    write(path, noise(3 * RATE))
    whole, _ = soundfile.read(path, dtype="float32", always_2d=True)
    monkeypatch.setattr(audio, "BLOCK_VALUES", 4_801)
    assert len([*audio.read_blocks(audio.probe(path), RATE)]) > 10
    np.testing.assert_allclose(read(path), whole, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_does_not_depend_on_blocks(tmp_path: Path, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(rate + 331), rate, subtype="FLOAT")
    monkeypatch.setattr(audio, "BLOCK_VALUES", 1_999)
    np.testing.assert_array_equal(read(path), soxr.resample(noise(rate + 331), rate, RATE))


@settings(max_examples=60)
@given(rate=st.integers(1_000, 200_000), frames=st.integers(1, 60_000))
def test_the_resampled_length_is_rounded(tmp_path_factory: pytest.TempPathFactory, rate: int, frames: int) -> None:
    path = tmp_path_factory.mktemp("length") / "a.wav"
    soundfile.write(path, np.zeros(frames), rate, subtype="PCM_16")
    file = audio.probe(path)
    exact = frames * RATE / rate
    assert abs(file.length_at(RATE) - exact) <= 0.5
    if file.length_at(RATE):
        assert len(read(path)) == file.length_at(RATE)
    else:
        with pytest.raises(ValueError, match="too short"):
            read(path)


def test_several_channels_are_downmixed_to_their_mean(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.wav", noise(5_000, channels=5)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read(path), samples.mean(axis=1, keepdims=True), atol=1e-7)
    np.testing.assert_array_equal(read(path, channels=5), samples)
    with pytest.raises(ValueError, match="has 5 channels, and the model takes 2"):
        read(path, channels=2)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize("start, stop", [(0, 1), (1, 60_001), (59_999, 60_000), (123_456, None)])
def test_a_section_equals_that_of_the_whole_file(tmp_path: Path, suffix: str, start: int, stop: int | None) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path, noise(6 * RATE + 77))
    section = np.concatenate([*audio.read_blocks(audio.probe(path), RATE, start=start, stop=stop)])
    assert np.array_equal(section, read(path)[start:stop])


def test_a_section_of_a_flac_without_a_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    write(path, noise(6 * RATE))
    content = bytearray(path.read_bytes())
    content[21], content[22:26] = content[21] & 0xF0, b"\0\0\0\0"  # as below
    path.write_bytes(content)
    section = np.concatenate([*audio.read_blocks(audio.probe(path), RATE, start=100_000, stop=100_100)])
    assert np.array_equal(section, read(path)[100_000:100_100])


def test_a_section_is_resampled_as_a_file_of_its_own(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a.wav", tmp_path / "b.wav"
    samples = np.round(noise(5 * 16_000, 2) * 32_768) / 32_768
    write(whole, samples, 16_000)
    write(cut, samples[10_000:70_001, 1:], 16_000)
    section = [*audio.read_blocks(audio.probe(whole), RATE, start=10_000, stop=70_001, channel=1)]
    assert np.array_equal(np.concatenate(section), read(cut))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"channel": 2}, "has 2 channels, and channel 2 (from 0) was asked for"),
        ({"channel": -1}, "has 2 channels, and channel -1 (from 0) was asked for"),
        ({"start": 16_000, "stop": 8_000}, "has 2 s, and 1 s to 0.5 s was asked for"),
        ({"stop": 40_000}, "has 2 s, and 0 s to 2.5 s was asked for"),
        ({"start": 32_000}, "has 2 s, and 2 s to 2 s was asked for"),
    ],
)
def test_a_section_that_is_not_there_is_refused(tmp_path: Path, options: dict[str, int], sentence: str) -> None:
    path = tmp_path / "a.wav"
    write(path, noise(32_000, 2), 16_000)
    with pytest.raises(audio.InputError, match=re.escape(sentence)):
        next(audio.read_blocks(audio.probe(path), RATE, **options))


@pytest.mark.parametrize(("rate", "frames"), [(10, 9_000), (50, 60_000), (2**31 - 1, 9_000_000)])
def test_extreme_sample_rates_need_little_memory(tmp_path: Path, rate: int, frames: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(frames), rate, subtype="PCM_U8")
    file, total = audio.probe(path), 0
    for block in audio.read_blocks(file, RATE):
        assert block.nbytes < 1 << 26
        total += len(block)
    assert total == file.length_at(RATE)


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    """Its writer could not seek back to fill in the chunk sizes."""
    path, samples = tmp_path / "a.wav", noise(5_000)
    soundfile.write(path, samples, RATE)
    data = bytearray(path.read_bytes())
    for size in (0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000):
        data[4:8] = data[40:44] = struct.pack("<I", size)
        path.write_bytes(data)
        assert audio.probe(path).frames == len(read(path)) == len(samples)


def test_a_flac_written_to_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.flac", noise(5_000)
    soundfile.write(path, samples, RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # clear the number of samples in STREAMINFO, 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert audio.probe(path).frames == len(read(path)) == len(samples)


def test_an_mp3_whose_header_has_no_length_is_read_to_find_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    write(path, np.concatenate([np.zeros((RATE, 1), np.float32), noise(3 * RATE)]))
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"\xff\xf3", 4) :])  # drop its first frame, the Xing header
    file = audio.probe(path)
    assert file.frames == len(read(path))
    assert abs(file.duration - 4) < 0.2


# Files that are refused


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "caf", "flac", "mp3", "ogg", "opus", "rf64", "w64"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path, noise(2 * RATE))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match="truncated") as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_ogg_file_without_its_last_page_is_refused(tmp_path: Path) -> None:
    """The remaining pages are complete, and libsndfile takes the last of them for the end of the file."""
    path = tmp_path / "a.ogg"
    write(path, noise(4 * RATE))
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    with pytest.raises(ValueError, match="truncated"):
        audio.probe(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_nan_or_infinite_are_refused(tmp_path: Path, value: float) -> None:
    path, samples = tmp_path / "a.wav", noise(3 * RATE, channels=2)
    samples[50_000, 1] = value
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"{path} holds {value} at sample 50000 \(2.083 s\)"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.wav", None, "does not exist"),
        ("a.wav", b"", "is empty"),
        ("a.wav", b"text instead of audio" * 50, "not an audio file"),
        ("a.raw", bytes(2_000), "headerless"),
    ],
)
def test_files_that_are_not_audio_are_refused(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} .*{sentence}"):
        audio.probe(path)


def test_audio_without_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(0), RATE)
    with pytest.raises(ValueError, match="holds no samples"):
        audio.probe(path)


# Writing


@pytest.mark.parametrize(("suffix", "clips"), [("wav", True), ("flac", True), ("mat5", False), ("ogg", False)])
def test_clipped_samples_are_counted(tmp_path: Path, suffix: str, clips: bool) -> None:
    path, samples = tmp_path / f"a.{suffix}", noise(9_000)
    samples[:3] = [[1.5], [-7.0], [1.0]]
    assert write(path, samples).clipped == (2 if clips else 0)
    if suffix != "ogg":
        np.testing.assert_allclose(read(path), samples.clip(-1, 1) if clips else samples, atol=1e-4)


def test_a_rate_that_the_format_does_not_support_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot write MP3 audio at 12345 Hz"):
        audio.AudioWriter(tmp_path / "a.mp3", ("MP3", "MPEG_LAYER_III"), 12_345)
