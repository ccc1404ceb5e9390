"""Random windows of training audio, from a folder of audio files or a data set of Hugging Face's `datasets`.

Window i of a run depends only on the seed and on i. Any process can therefore produce it, and a resumed run sees the
same windows as a run that was never interrupted. Files that cannot be read are skipped; each batch lists their names.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError
from ..io.audio import SUFFIXES, UNKNOWN_FRAMES, Forward, files_below
from .config import DataConfig

MAX_UNREADABLE = 100  # consecutive unreadable files, after which reading fails
# seconds of an MP3 that are decoded and discarded before a window: frames depend on earlier ones, and the first frames
# after a seek are silent or wrong
MP3_LEAD = 20
TEACHER_RATE = 16_000  # Hz, the sample rate of the distillation teacher's input


@dataclass(frozen=True)
class Batch:
    """Windows of audio, the names of their files, and the names of files that could not be read."""

    audio: Tensor  # [B, C, N]
    teacher_audio: Tensor | None  # [B, N * 16,000 / rate], mono at 16 kHz; None without distillation
    names: list[str]
    unread: list[str]

    def pin_memory(self) -> Batch:
        teacher_audio = None if self.teacher_audio is None else self.teacher_audio.pin_memory()
        return replace(self, audio=self.audio.pin_memory(), teacher_audio=teacher_audio)

    def to(self, device: torch.device) -> Batch:
        teacher_audio = None if self.teacher_audio is None else self.teacher_audio.to(device, non_blocking=True)
        return replace(self, audio=self.audio.to(device, non_blocking=True), teacher_audio=teacher_audio)


class Source(Protocol):
    """A collection of recordings, indexed by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        """Read `seconds` and one more sample from a random position: float32 [samples, channels], and the sample rate.

        A recording that is shorter is returned whole. Raises LibsndfileError, OSError or InputError for one that cannot
        be read.
        """


class AudioFolder:
    """The audio files of a directory, scanned recursively."""

    def __init__(self, path: str | Path):
        root = Path(path)
        if not root.is_dir():
            raise InputError(f"data.folder must be a directory of audio files, got {path}")
        self.files = files_below(root)
        if not self.files:
            raise InputError(f"{path} holds no audio files ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        return _read_random_window(self.files[index], rng, seconds)


class DatasetColumn:
    """The audio column of a data set that `datasets.load_dataset` loads."""

    def __init__(self, name: str, configuration: str | None, split: str, column: str):
        try:
            from datasets import Audio, load_dataset
            from datasets.exceptions import DatasetsError
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise
            raise InputError("data.dataset needs the package datasets: pip install datasets") from None
        try:
            rows = load_dataset(name, configuration, split=split)
        except (DatasetsError, ValueError, OSError) as error:
            raise InputError(f"data.dataset {name!r} could not be loaded: {str(error).splitlines()[0]}") from None
        if column not in rows.column_names:
            raise InputError(f"data.column must be one of {', '.join(rows.column_names)} of {name}, got {column!r}")
        self.rows, self.column, self.source = rows.cast_column(column, Audio(decode=False)), column, name

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.source}[{index}]"

    def read(self, index: int, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        stored = self.rows[index][self.column] or {"bytes": None, "path": None}
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
        if source is None or str(source).lower().endswith(".raw"):  # soundfile would need its rate and sample type
            raise InputError(f"{self.name(index)} holds no audio, or headerless audio")
        return _read_random_window(source, rng, seconds)


def _read_random_window(
    source: str | Path | io.BytesIO, rng: np.random.Generator, seconds: float
) -> tuple[np.ndarray, int]:
    """`Source.read` of one file, given as a path or as bytes in memory."""
    with soundfile.SoundFile(source) as file:
        wanted = int(np.ceil(seconds * file.samplerate)) + 1
        if file.frames < UNKNOWN_FRAMES:
            start = int(rng.integers(max(0, file.frames - wanted) + 1))
            lead = min(start, MP3_LEAD * file.samplerate) if file.format == "MP3" else 0
            file.seek(start - lead)
            return file.read(lead + wanted, dtype="float32", always_2d=True)[lead:], file.samplerate
    if isinstance(source, io.BytesIO):
        source.seek(0)
    with Forward(source) as file:  # a file that was written to a pipe: its header does not say how long it is
        blocks = [np.zeros((0, file.channels), np.float32)]
        while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
            blocks.append(block)
        audio = np.concatenate(blocks)
        start = int(rng.integers(max(0, len(audio) - wanted) + 1))
        return audio[start : start + wanted], file.samplerate


# audio [C, N], teacher audio [M] or None, name of its file, names of unreadable files
Window = tuple[np.ndarray, np.ndarray | None, str, list[str]]


class Windows(Dataset[Window]):
    """The windows of a run."""

    def __init__(self, source: Source, seconds: float, rate: int, channels: int, seed: int, with_teacher: bool):
        self.source, self.seconds, self.rate, self.channels = source, seconds, rate, channels
        self.seed, self.with_teacher = seed, with_teacher
        self.samples = round(seconds * rate)

    def __getitem__(self, number: int) -> Window:
        rng = np.random.default_rng([self.seed, number])
        unread: list[str] = []
        for _ in range(MAX_UNREADABLE):
            index = int(rng.integers(len(self.source)))
            window, name = self._read(index, rng), self.source.name(index)
            if window is not None:
                return *window, name, unread
            unread.append(name)
        raise InputError(f"{MAX_UNREADABLE} files in a row could not be read, the last one {unread[-1]}")

    def _read(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None] | None:
        """A window [C, N] of a recording, and the teacher's [M]; None if it cannot be read or is not finite."""
        try:
            audio, rate = self.source.read(index, rng, self.seconds)
        except (soundfile.LibsndfileError, OSError, InputError):
            return None
        if not len(audio) or not np.isfinite(audio).all():
            return None
        audio = self._to_codec_format(audio, rate)
        teacher_audio = soxr.resample(audio.mean(axis=0), self.rate, TEACHER_RATE) if self.with_teacher else None
        # resampling overflows with samples that are too large
        finite = np.isfinite(audio).all() and (teacher_audio is None or np.isfinite(teacher_audio).all())
        return (audio, teacher_audio) if finite else None

    def _to_codec_format(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """[samples, channels] at any rate -> [C, N]: mix to the codec's channels, resample, cut or zero-pad to N."""
        if audio.shape[1] != self.channels:
            audio = np.repeat(audio.mean(axis=1, keepdims=True), self.channels, axis=1)
        audio = soxr.resample(audio, rate, self.rate).T[:, : self.samples]
        return np.pad(audio, ((0, 0), (0, self.samples - audio.shape[1])))


class WindowSampler(Sampler[int]):
    """The numbers of the windows that one process reads: in each step of `size` windows, its own `share` of them."""

    def __init__(self, steps: range, size: int, rank: int, share: int):
        self.steps, self.size, self.rank, self.share = steps, size, rank, share

    def __len__(self) -> int:
        return len(self.steps) * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            begin = step * self.size + self.rank * self.share
            yield from range(begin, begin + self.share)


def _collate(items: list[Window]) -> Batch:
    """Windows of `Windows` as one batch."""
    audio, teacher_audio, names, unread = zip(*items, strict=True)
    stacked = None if teacher_audio[0] is None else torch.from_numpy(np.stack(teacher_audio))
    return Batch(torch.from_numpy(np.stack(audio)), stacked, list(names), [name for some in unread for name in some])


def _ignore_first_sigterm(_: int) -> None:
    """In a data loader process: ignore the first SIGTERM, and end at the second.

    Job schedulers send SIGTERM to the whole process group. The training process answers it by finishing its step and
    saving a checkpoint, for which it still needs its data loader processes. At exit, Python sends SIGTERM to those that
    are left and waits for them: the second one must end them.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def open_source(config: DataConfig) -> Source:
    """The folder or data set that the configuration names; raises InputError if it cannot be opened."""
    if config.folder is not None:
        return AudioFolder(config.folder)
    assert config.dataset is not None
    return DatasetColumn(config.dataset, config.name, config.split, config.column)


def batches(
    windows: Windows, config: DataConfig, first: int, steps: int, process: tuple[int, int]
) -> DataLoader[Window]:
    """The batches of steps `first` to `steps` for one process, given as (rank, number of processes)."""
    rank, processes = process
    share = config.batch_size // processes
    if share * processes != config.batch_size:
        raise InputError(f"data.batch_size must be a multiple of the {processes} processes, got {config.batch_size}")

    sampler = WindowSampler(range(first, steps), config.batch_size, rank, share)
    return DataLoader(
        windows, share, sampler=sampler, collate_fn=_collate, num_workers=config.workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=_ignore_first_sigterm,
    )  # fmt: skip
