"""Decode a table of codes: to a folder of audio files, or to a WebDataset of them; a stopped run goes on when repeated.

Rows of similar length are decoded together as a ragged batch, which gives each the audio of its own decoding; longer
ones alone, as a stream. What exists is finished, and is skipped: files are written under another name and renamed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checkpoints import weights
from ..checkpoints.fit import check_fit
from ..errors import InputError
from ..io.audio import AudioWriter, output_format
from ..io.files import path_of, replacing
from ..io.transcode import Clock, decode
from ..models.validation import json_object
from .codes import CodesTable, Record, Source, samples_of
from .names import add_member, file_name
from .shards import Settings

if TYPE_CHECKING:
    from ..models.codec import Codec

BATCH_FRAMES = 1500  # frames of a batch, with padding: 2 minutes at 12.5 Hz
WINDOW_FRAMES = 7500  # frames of the rows among which those of similar length are found
SETTINGS = "detokenize.json"

Blocks = Iterable[np.ndarray]  # of [samples, channels]


@dataclass
class Written:
    """What a run has done."""

    files: int = 0
    seconds: float = 0.0  # of the audio written
    skipped: int = 0  # rows whose audio was there
    clipped: int = 0  # samples outside [-1, 1]


def detokenize(
    source: Source, target: str | Path, model: Codec | str = "kyutai/mimi", *, suffix: str = "flac",
    webdataset: bool = False, num_codebooks: int | None = None, force: bool = False, name: str | None = None,
    on_progress: Callable[[float], None] = lambda seconds: None,
) -> Written:  # fmt: skip
    """Decode every row of a table of codes to an audio file named after its id (`names.file_name`).

    Args:
        source: the output folder of `fastmimi tokenize`, one shard, or several shards.
        target: a folder, made if it is not there.
        model: a codec, or what `fastmimi.load` takes.
        suffix: the format of the audio: flac, wav, ogg, ...
        webdataset: write a tar for each shard, with the audio and the other columns as JSON, instead of single files.
        num_codebooks: decode only the first codebooks; by default all.
        force: decode even if the codes were made with other weights.
        name: what errors and the record of the run call the model; by default `model`, or what the table says.
        on_progress: called with the seconds of audio of each row that was written or skipped.

    The audio has the length of the original, at the codec's sample rate. Raises InputError, before any work, if the
    model has other weights than the one that made the codes (by their fingerprint), if `target` holds the results of
    other settings, or if an argument is invalid.
    """
    table, folder = CodesTable(source), path_of(target, "target")
    count, kind = table.codebooks(num_codebooks), output_format(Path(f"audio.{suffix}"))
    if name is None:
        name = model if isinstance(model, str) else table.settings.model
    codec = weights.load(model) if isinstance(model, str) else model
    check_fit(table.settings, codec, table.files[0], name, force=force)
    _check_settings(folder, {
        "model": name, "fingerprint": weights.fingerprint(codec), "num_codebooks": count, "suffix": suffix,
        "webdataset": webdataset,
    })  # fmt: skip
    output = _Output(codec, table.settings, kind, on_progress)
    for file, groups in groupby(table.groups, key=lambda group: group.file):
        if webdataset:
            rows = (row for group in groups for row in table.records(group, None, count))
            output.to_tar(rows, folder / f"{file.stem}.tar", suffix)
        else:
            rows = (row for group in groups for row in table.records(group, ["duration"], count))
            output.to_files(rows, folder, suffix)
    return output.written


def _check_settings(folder: Path, settings: dict[str, object]) -> None:
    """Record the settings in a new folder; raise InputError if they are others than the recorded ones."""
    path = folder / SETTINGS
    if path.exists():
        if (recorded := json_object(path.read_bytes())) is None:
            raise InputError(f"{path} is damaged: write to another folder, or remove this one")
        for key, value in settings.items():
            if recorded.get(key) != value:
                raise InputError(f"{folder} was written with {key} {recorded.get(key)!r}, not {value!r}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


class _Output:
    """Writes the audio of rows, and counts."""

    def __init__(self, codec: Codec, settings: Settings, kind: tuple[str, str], on_progress: Callable[[float], None]):
        self.codec, self.settings, self.kind, self.on_progress = codec, settings, kind, on_progress
        self.written = Written()

    def to_files(self, rows: Iterable[Record], folder: Path, suffix: str) -> None:
        def path_for(row: Record) -> Path:
            return folder / f"{file_name(row['id'])}.{suffix}"

        for row, blocks in decoded(self.codec, self.settings, self._missing(rows, path_for)):
            path = path_for(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                self._write(row, blocks, part)

    def to_tar(self, rows: Iterable[Record], path: Path, suffix: str) -> None:
        if path.exists():
            for _ in self._missing(rows, lambda row: path):
                pass
            return
        with (
            TemporaryDirectory(prefix=".", dir=path.parent) as scratch,
            replacing(path) as part,
            tarfile.open(part, "w") as tar,
        ):
            audio = Path(scratch, f"audio.{suffix}")
            for row, blocks in decoded(self.codec, self.settings, rows):
                self._write(row, blocks, audio)
                others = {name: value for name, value in row.items() if name != "codes"}
                key = file_name(row["id"])
                add_member(tar, f"{key}.{suffix}", audio.read_bytes())
                add_member(tar, f"{key}.json", json.dumps(others, ensure_ascii=False, default=str).encode())

    def _missing(self, rows: Iterable[Record], path_for: Callable[[Record], Path]) -> Iterator[Record]:
        """The rows whose file does not exist; the others count as skipped."""
        for row in rows:
            if path_for(row).exists():
                self.written.skipped += 1
                self.on_progress(row["duration"])
            else:
                yield row

    def _write(self, row: Record, blocks: Blocks, path: Path) -> None:
        with AudioWriter(path, self.kind, self.codec.sample_rate, self.codec.config.audio_channels) as writer:
            for block in blocks:
                writer.write(block)
        self.written.files += 1
        self.written.seconds += row["duration"]
        self.written.clipped += writer.clipped
        self.on_progress(row["duration"])


# Decoding


def decoded(codec: Codec, settings: Settings, rows: Iterable[Record]) -> Iterator[tuple[Record, Blocks]]:
    """Each row with its audio, in order: blocks [samples, channels], which must be read before the next row."""
    for window in _windows(rows):
        found: dict[int, Blocks] = {}
        for batch in batches([row["codes"].shape[1] for row in window]):
            found |= zip(batch, _decode_batch(codec, settings, [window[i] for i in batch]), strict=True)
        for i, row in enumerate(window):
            # a row in no batch is too long for one
            yield row, found[i] if i in found else decode(codec, row["codes"], samples_of(row, settings), Clock())


def _windows(rows: Iterable[Record]) -> Iterator[list[Record]]:
    window: list[Record] = []
    frames = 0
    for row in rows:
        window.append(row)
        frames += row["codes"].shape[1]
        if frames >= WINDOW_FRAMES:
            yield window
            window, frames = [], 0
    if window:
        yield window


def batches(lengths: list[int]) -> Iterator[list[int]]:
    """Rows of so many frames each -> batches of row numbers, of at most `BATCH_FRAMES` frames with padding.

    Rows in a batch are next to each other in length. Longer rows are in no batch.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] > BATCH_FRAMES:
            break
        if (len(batch) + 1) * lengths[i] > BATCH_FRAMES:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _decode_batch(codec: Codec, settings: Settings, rows: list[Record]) -> list[Blocks]:
    """The audio of each row as one block."""
    lengths = torch.tensor([row["codes"].shape[1] for row in rows])
    codes = torch.zeros(len(rows), len(rows[0]["codes"]), int(lengths.max()), dtype=torch.int64)
    for padded, row in zip(codes, rows, strict=True):
        padded[:, : row["codes"].shape[1]] = torch.from_numpy(row["codes"])
    mask = torch.arange(codes.shape[2]) < lengths[:, None]
    audio = codec.decode(codes, padding_mask=None if mask.all() else mask).float().cpu().numpy()  # [B, C, N]
    return [[sound[:, : samples_of(row, settings)].T] for sound, row in zip(audio, rows, strict=True)]
