"""What a tokenised corpus holds: hours, rows and frames, errors, and how the codebooks are used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ..io.files import path_of
from ..models.usage import Usage, usage_from_histograms
from .codes import CodesTable, Source


@dataclass
class Stats:
    """The statistics of a corpus; without `histograms` and `durations`, what `to_json` gives."""

    rows: int
    frames: int
    hours: float
    errors: int  # rows of the manifest that could not be read
    shards: int
    model: str
    fingerprint: str
    usage: list[Usage]  # of each codebook
    histograms: np.ndarray = field(repr=False)  # [K, S] int64: how often each entry occurs
    durations: np.ndarray = field(repr=False)  # [rows] in seconds

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name not in ("histograms", "durations")}
        return json.dumps(values, indent=1)


def stats(source: Source) -> Stats:
    """Count the rows, frames and codes of a table of codes (`CodesTable`), one row group at a time."""
    table = CodesTable(source)
    settings = table.settings
    histograms = np.zeros((settings.num_codebooks, settings.codebook_size), np.int64)
    durations, frames = [np.zeros(0)], 0
    for group in table.groups:
        rows = table.table(group, ["codes", "n_frames", "duration"])
        durations.append(rows["duration"].to_numpy())
        frames += int(rows["n_frames"].to_numpy().sum())
        for chunk in rows["codes"].chunks:
            levels = chunk.flatten()  # rows * K lists of T codes
            level = np.repeat(np.arange(len(levels)) % settings.num_codebooks, levels.value_lengths().to_numpy())
            flat = level * settings.codebook_size + levels.flatten().to_numpy()
            histograms += np.bincount(flat, minlength=histograms.size).reshape(histograms.shape)
    seconds = np.concatenate(durations)
    return Stats(
        rows=len(table), frames=frames, hours=float(seconds.sum()) / 3600, errors=errors_of(source),
        shards=len(table.files), model=settings.model, fingerprint=settings.fingerprint,
        usage=usage_from_histograms(histograms), histograms=histograms, durations=seconds,
    )  # fmt: skip


def errors_of(source: Source) -> int:
    """The number of rows that failed, as `errors` of the output folder has them; 0 for shards without a folder."""
    if not isinstance(source, str | Path) or not path_of(source, "source").is_dir():
        return 0
    files = Path(source, "errors").glob("shard-*.parquet")
    return sum(pq.read_metadata(file).num_rows for file in files)
