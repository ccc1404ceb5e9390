"""Training data: windows of folders and data sets, and synthetic speech."""

import io

import numpy as np
import pytest
import soundfile
import torch

from fastmimi.devtools.testing import noise
from fastmimi.io.audio import Forward
from fastmimi.train import data, synthesis
from fastmimi.train.config import DataConfig
from fastmimi.train.data import TEACHER_RATE, AudioFolder, DatasetColumn, Windows, batches, open_source
from fastmimi.train.synthesis import Synthesizer, passages, simulate_recording, synthesize

RATE = 24_000


def tone(hz, seconds, rate, channels=1):
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat(0.5 * np.sin(2 * np.pi * hz * time, dtype=np.float32)[:, None], channels, axis=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "a.wav", tone(500, 3, 16_000), 16_000)
    soundfile.write(tmp_path / "deep" / "b.flac", tone(500, 2, 44_100, 2), 44_100)
    soundfile.write(tmp_path / "short.ogg", tone(500, 0.3, RATE), RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def windows(folder, seconds=1.0, channels=1, seed=0, with_teacher=True):
    return Windows(AudioFolder(folder), seconds, RATE, channels, seed, with_teacher)


def peak_frequency(audio):
    """Frequency in Hz of the largest bin of the spectrum of [N]."""
    return np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * RATE / len(audio)


def test_windows_have_the_sample_rate_of_the_codec(folder):
    found = {}
    for number in range(30):
        audio, teacher_audio, name, unread = windows(folder)[number]
        assert audio.shape == (1, RATE) and teacher_audio.shape == (TEACHER_RATE,) and not unread
        assert audio.dtype == teacher_audio.dtype == np.float32
        found[name.rpartition("/")[2]] = audio[0]
    assert found.keys() == {"a.wav", "b.flac", "short.ogg"}
    assert all(abs(peak_frequency(audio[: RATE // 4]) - 500) < 5 for audio in found.values())
    assert not found["short.ogg"][RATE // 2 :].any() and found["a.wav"][RATE // 2 :].any()


def test_channels_are_mixed_or_repeated(folder):
    audio, _, _, _ = windows(folder, channels=2)[0]
    assert audio.shape == (2, RATE) and np.array_equal(audio[0], audio[1])


def test_a_window_depends_only_on_its_number_and_the_seed(folder):
    first, second, other = windows(folder)[7], windows(folder)[7], windows(folder, seed=1)
    assert np.array_equal(first[0], second[0]) and first[2] == second[2]
    assert any(not np.array_equal(windows(folder)[i][0], other[i][0]) for i in range(5))


def test_unreadable_files_are_skipped(folder):
    (folder / "broken.wav").write_bytes(b"RIFF no")
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, "FLOAT")
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(folder / "huge.wav", np.full((RATE, 2), 3e38, np.float32), RATE, "FLOAT")
    (folder / "folder.wav").mkdir()
    unread = [name.rpartition("/")[2] for number in range(60) for name in windows(folder)[number][3]]
    assert set(unread) == {"broken.wav", "nan.wav", "empty.wav", "huge.wav"}
    for name in ("a.wav", "deep/b.flac", "short.ogg"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"100 files in a row could not be read, the last one .*\.wav"):
        windows(folder)[0]


def test_bugs_are_not_taken_for_unreadable_files(folder, monkeypatch):
    monkeypatch.setattr(AudioFolder, "read", lambda self, index: None)
    with pytest.raises(TypeError, match="positional argument"):
        windows(folder)[0]


def _without_length(flac):
    header = bytearray(flac)
    at = header.index(b"fLaC") + 8 + 13  # the 36 bits of STREAMINFO's total samples
    header[at] &= 0xF0
    header[at + 1 : at + 5] = bytes(4)
    return header


def test_flac_from_a_pipe_is_read_from_any_position(tmp_path):
    """Its header does not contain its length."""
    written = io.BytesIO()
    ramp = np.linspace(0, 0.9, 10 * 16_000, dtype=np.float32)
    soundfile.write(written, ramp, 16_000, format="FLAC")
    (tmp_path / "pipe.flac").write_bytes(_without_length(written.getvalue()))
    starts = [windows(tmp_path, with_teacher=False)[number][0][0, 100] for number in range(12)]
    assert max(starts) - min(starts) > 0.3
    short = Windows(AudioFolder(tmp_path), 12.0, RATE, 1, 0, False)[0]
    assert not short[3] and not short[0][0, 10 * RATE + 100 :].any()


def test_flac_from_a_pipe_that_ends_after_its_header_is_skipped(folder):
    written = io.BytesIO()
    soundfile.write(written, np.zeros(16_000), 16_000, format="FLAC")
    (folder / "cut.flac").write_bytes(_without_length(written.getvalue())[:42])  # "fLaC" and STREAMINFO
    assert {name.rpartition("/")[2] for number in range(20) for name in windows(folder)[number][3]} == {"cut.flac"}


def test_data_sets_can_contain_flac_from_a_pipe():
    """The files of data sets are bytes in memory, which are opened twice."""
    written = io.BytesIO()
    soundfile.write(written, np.linspace(0.1, 0.9, 16_000), 16_000, format="FLAC")
    audio, rate = data._read_random_window(
        io.BytesIO(_without_length(written.getvalue())), np.random.default_rng(0), 0.5
    )
    assert len(audio) == 8001 and rate == 16_000 and audio.min() >= 0.09


def test_windows_of_mp3_equal_those_of_the_whole_file(tmp_path):
    """Frames depend on earlier ones: directly after a seek, the first few are silent or wrong."""
    audio = noise(40 * 24_000, scale=0.1).numpy()
    soundfile.write(tmp_path / "a.mp3", audio, 24_000, bitrate_mode="CONSTANT", compression_level=0.95)
    with Forward(tmp_path / "a.mp3") as file:
        whole = file.read(file.frames, dtype="float32", always_2d=True)
    for seed in range(5):
        window, _ = data._read_random_window(tmp_path / "a.mp3", np.random.default_rng(seed), 0.5)
        start = int(np.random.default_rng(seed).integers(len(whole) - 12_001 + 1))
        assert np.abs(window - whole[start : start + 12_001]).max() < 1e-6


def test_folders_without_audio_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no audio files"):
        AudioFolder(tmp_path)
    with pytest.raises(ValueError, match=r"data\.folder must be a directory of audio files, got .*none"):
        AudioFolder(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_divide_the_windows_of_a_step(folder, workers):
    config = DataConfig(batch_size=4, workers=workers)
    source = windows(folder, seconds=0.1)
    one_process = list(batches(source, config, 0, 3, (0, 1)))
    assert [len(batch.names) for batch in one_process] == [4, 4, 4] and one_process[0].audio.shape == (4, 1, 2400)
    two_processes = [list(batches(source, config, 0, 3, (rank, 2))) for rank in range(2)]
    for whole, *halves in zip(one_process, *two_processes, strict=True):
        assert torch.equal(whole.audio, torch.cat([half.audio for half in halves]))
    later = list(batches(source, config, 2, 3, (0, 1)))
    assert len(later) == 1 and torch.equal(later[0].audio, one_process[2].audio), (
        "a resumed run continues with the same windows"
    )
    with pytest.raises(ValueError, match=r"data\.batch_size must be a multiple of the 3 processes, got 4"):
        batches(source, config, 0, 3, (0, 3))


@pytest.mark.slow
def test_data_sets(folder, tmp_path, monkeypatch):
    import datasets

    def source_of(*paths):
        rows = datasets.Dataset.from_dict({"speech": [path and str(folder / path) for path in paths]})
        monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split: rows)
        return open_source(DataConfig(dataset="someone/speech", split="test", column="speech"))

    (folder / "headerless.raw").write_bytes(bytes(1000))
    some = Windows(source_of("a.wav", None, "headerless.raw", "nowhere.wav"), 1.0, RATE, 1, 0, False)
    assert {name for number in range(20) for name in some[number][3]} == {f"someone/speech[{i}]" for i in (1, 2, 3)}
    source = source_of("a.wav", "deep/b.flac")
    assert isinstance(source, DatasetColumn) and len(source) == 2 and source.name(1) == "someone/speech[1]"
    audio, _, name, unread = Windows(source, 1.0, RATE, 1, 0, False)[0]
    assert name.startswith("someone/speech[") and not unread and abs(peak_frequency(audio[0]) - 500) < 5
    with pytest.raises(ValueError, match=r"data\.column must be one of speech of someone/speech, got 'audio'"):
        open_source(DataConfig(dataset="someone/speech"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"data\.dataset '.*nowhere' could not be loaded: "):
        open_source(DataConfig(dataset=str(tmp_path / "nowhere")))


# Synthetic speech


def test_passages_are_a_few_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("One sentence. " * 40 + "\n\nToo short.\n%\n" + "Müller & Söhne, " * 10)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    found = passages(tmp_path)
    assert found and all(60 <= len(text) <= 260 for text in found)
    assert found[0].startswith("One sentence. One sentence.") and found[-1].isascii()
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="contains no text of at least 60 characters"):
        passages(tmp_path)


def test_simulated_recordings_are_finite_and_within_bounds():
    audio = tone(300, 1, 16_000)[:, 0].astype(np.float64)
    made = [simulate_recording(np.random.default_rng(seed), audio, 16_000) for seed in range(20)]
    assert all(np.isfinite(a).all() and np.abs(a).max() <= 0.951 and len(a) == len(audio) for a in made)
    levels = [20 * np.log10(np.sqrt(np.mean(a**2))) for a in made]
    assert -34 < min(levels) < -26 < -20 < max(levels) < -14


def test_the_same_seed_gives_the_same_data_set(tmp_path, monkeypatch):
    """The synthesizer of this test turns every text into a tone."""
    read = tmp_path / "text.txt"
    read.write_text("A sentence that is read again and again, until there is enough of it. " * 3)
    soundfile.write(tmp_path / "tone.wav", tone(200, 4, 16_000), 16_000)
    reader = Synthesizer("cp", 1.0, lambda rng, text, wave: ["cp", str(tmp_path / "tone.wav"), str(wave)])
    silent = Synthesizer("true", 1.0, lambda rng, text, wave: ["true"])
    absent = Synthesizer("no-such-program", 1.0, lambda rng, text, wave: [])
    monkeypatch.setattr(synthesis, "SYNTHESIZERS", [reader, silent, absent])
    hours = synthesize(tmp_path / "one", 0.01, 3, read)
    assert 0.01 <= hours < 0.06
    synthesize(tmp_path / "two", 0.01, 3, read)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert len(one) > 5 and [a.name for a in one] == [b.name for b in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    kept = one[0].stat().st_mtime_ns
    one[1].unlink()
    assert synthesize(tmp_path / "one", 0.01, 3, read) == pytest.approx(hours)
    assert one[0].stat().st_mtime_ns == kept and one[1].exists(), "existing files are not written again"
    rates = {soundfile.info(path).samplerate for path in one}
    assert len(rates) > 3, "vocal tracts of several lengths"
    monkeypatch.setattr(synthesis, "SYNTHESIZERS", [silent, absent])
    with pytest.raises(ValueError, match="no speech from 32 texts in a row: check true and"):
        synthesize(tmp_path / "three", 0.01, 3, read)
    monkeypatch.setattr(synthesis, "SYNTHESIZERS", [absent])
    with pytest.raises(ValueError, match="no speech synthesizer is installed: apt-get install"):
        synthesize(tmp_path / "three", 0.01, 3, read)
