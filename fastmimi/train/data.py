"""Windows of speech to train on: a folder of audio files, or a data set of Hugging Face's `datasets`.

Window number i of a run is drawn from (seed, i) alone, so that any process can make it, and a run that goes on after a
stop sees what it would have seen. Files that cannot be read are passed over, and named with the window.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError
from ..io.audio import SUFFIXES, UNKNOWN, Forward, files_below
from .config import DataConfig

TRIES = 100  # files in a row that cannot be read
LEAD = 20  # seconds of MP3 before a window: its frames lean on earlier ones, and the first after a seek are silent
HEARD = 16_000  # Hz, what the teacher of the distillation hears


@dataclass(frozen=True)
class Batch:
    """Windows, their names, and what was passed over on the way."""

    audio: Tensor  # [B, C, N]
    heard: Tensor | None  # [B, N * 16,000 / rate], mono, for the teacher
    names: list[str]
    unread: list[str]

    def pin_memory(self) -> Batch:
        return replace(
            self, audio=self.audio.pin_memory(), heard=None if self.heard is None else self.heard.pin_memory()
        )

    def to(self, device: torch.device) -> Batch:
        heard = None if self.heard is None else self.heard.to(device, non_blocking=True)
        return replace(self, audio=self.audio.to(device, non_blocking=True), heard=heard)


class Source(Protocol):
    """Recordings by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int, draw: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        """So many seconds or a sample more from a random place, float32 [samples, channels], and their rate."""


class Folder:
    """Audio files of a folder and those below it."""

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

    def read(self, index: int, draw: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        return _piece(self.files[index], draw, seconds)


class Table:
    """A column of audio of a data set, as `datasets.load_dataset` finds it."""

    def __init__(self, name: str, configuration: str | None, split: str, column: str):
        try:
            from datasets import Audio, load_dataset
            from datasets.exceptions import DatasetsError
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise
            raise InputError("data.dataset needs a package: pip install datasets") from None
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

    def read(self, index: int, draw: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
        stored = self.rows[index][self.column]
        return _piece(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"], draw, seconds)


def _piece(where: Any, draw: np.random.Generator, seconds: float) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(where) as file:
        wanted = int(np.ceil(seconds * file.samplerate)) + 1
        if file.frames < UNKNOWN:
            start = int(draw.integers(max(0, file.frames - wanted) + 1))
            lead = min(start, LEAD * file.samplerate) if file.format == "MP3" else 0
            file.seek(start - lead)
            return file.read(lead + wanted, dtype="float32", always_2d=True)[lead:], file.samplerate
    if isinstance(where, io.BytesIO):
        where.seek(0)
    with Forward(where) as file:  # as what was written to a pipe: how long it is shows at its end
        blocks = []
        while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
            blocks.append(block)
        audio = np.concatenate(blocks)
        start = int(draw.integers(max(0, len(audio) - wanted) + 1))
        return audio[start : start + wanted], file.samplerate


class Windows(Dataset[Any]):
    """Window i of a run: (audio [C, N], what the teacher hears [M] or None, its name, what could not be read)."""

    def __init__(self, source: Source, seconds: float, rate: int, channels: int, seed: int, heard: bool):
        self.source, self.seconds, self.rate, self.channels = source, seconds, rate, channels
        self.seed, self.heard = seed, heard
        self.samples = round(seconds * rate)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray | None, str, list[str]]:
        draw, unread = np.random.default_rng([self.seed, number]), []
        for _ in range(TRIES):
            index = int(draw.integers(len(self.source)))
            name = self.source.name(index)
            try:
                audio, rate = self.source.read(index, draw, self.seconds)
                if not len(audio) or not np.isfinite(audio).all():
                    raise ValueError("no samples, or not finite ones")
            except (soundfile.LibsndfileError, OSError, ValueError, TypeError):
                unread.append(name)
                continue
            audio = self._fitted(audio, rate)
            heard = soxr.resample(audio.mean(axis=0), self.rate, HEARD) if self.heard else None
            if np.isfinite(audio).all() and (heard is None or np.isfinite(heard).all()):
                return audio, heard, name, unread
            unread.append(name)  # samples so large that resampling overflows
        raise InputError(f"{TRIES} files in a row could not be read, the last one {unread[-1]}")

    def _fitted(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """[samples, channels] at some rate -> [C, N]: mixed down, resampled, filled with zeros."""
        if audio.shape[1] != self.channels:
            audio = np.repeat(audio.mean(axis=1, keepdims=True), self.channels, axis=1)
        audio = soxr.resample(audio, rate, self.rate).T[:, : self.samples]
        return np.pad(audio, ((0, 0), (0, self.samples - audio.shape[1])))


class Numbers(Sampler[int]):
    """Numbers of the windows of one process, step after step: `share` of every `size`."""

    def __init__(self, steps: range, size: int, rank: int, share: int):
        self.steps, self.size, self.rank, self.share = steps, size, rank, share

    def __len__(self) -> int:
        return len(self.steps) * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            begin = step * self.size + self.rank * self.share
            yield from range(begin, begin + self.share)


def _together(items: list[Any]) -> Batch:
    audio, heard, names, unread = zip(*items, strict=True)
    ears = None if heard[0] is None else torch.from_numpy(np.stack(heard))
    return Batch(torch.from_numpy(np.stack(audio)), ears, list(names), [name for some in unread for name in some])


def _outlive_sigterm(_: int) -> None:
    """In a process that reads: SIGTERM to a whole group is for the run to answer, which goes on for a step.

    The second one is meant: processes that are left when Python exits would be waited for.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def source_of(config: DataConfig) -> Source:
    if config.folder is not None:
        return Folder(config.folder)
    assert config.dataset is not None
    return Table(config.dataset, config.name, config.split, config.column)


def batches(windows: Windows, config: DataConfig, first: int, steps: int, place: tuple[int, int]) -> DataLoader[Any]:
    """Batches of the steps from `first` on, of this process: its number, and how many there are."""
    rank, processes = place
    share = config.batch_size // processes
    if share * processes != config.batch_size:
        raise InputError(f"data.batch_size must be a multiple of the {processes} processes, got {config.batch_size}")

    numbers = Numbers(range(first, steps), config.batch_size, rank, share)
    return DataLoader(
        windows, share, sampler=numbers, collate_fn=_together, num_workers=config.workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=_outlive_sigterm,
    )  # fmt: skip
