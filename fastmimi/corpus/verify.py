"""Check a folder of codes: every row of its manifest is there once, and a sample of them encodes to the same codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..errors import InputError, one_line, shown
from ..io.files import path_of
from ..models.codec import Codec
from . import manifest, reading, shards
from .rows import Row


@dataclass
class Report:
    """What `verify` found.

    rows, errors: rows with codes, and those that could not be read; missing: shards that are not finished.
    wrong: one sentence for each shard or row that is not as it should be.
    checked: rows that were encoded again; unreadable: sentences on rows that now cannot be.
    """

    rows: int = 0
    errors: int = 0
    missing: int = 0
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def verify(
    folder: str | Path, codec: Codec, *, sample: int = 20, seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:  # fmt: skip
    """Check all shards of a folder, and encode `sample` rows again, each alone, which `seed` draws from all.

    Raises InputError if the folder is not of a run, or the codec is not the one that made it.
    """
    folder = path_of(folder, "a folder of codes")
    if type(sample) is not int or sample < 0:
        raise InputError(f"sample must be an integer >= 0, got {shown(sample)}")
    run = shards.Run.read(folder)
    if (difference := run.settings.difference(shards.Settings.of(codec, ""))) is not None:
        raise InputError(f"{folder} was not made with this model: {difference}")
    table, report = manifest.read(folder / shards.MANIFEST), Report()
    if manifest.digest(table) != run.manifest:
        report.wrong.append(f"{folder / shards.MANIFEST} is not the manifest that the run began with")
        return report
    chosen = np.random.default_rng(seed).permutation(table.num_rows)[:sample].tolist()
    for shard in range(run.num_shards):
        if not shards.shard_path(folder, shard).exists():
            report.missing += 1
            continue
        rows = run.rows_of(shard)
        found = _shard(folder, shard, table.slice(rows.start, len(rows)), run.settings, report)
        for number in sorted(n for n in chosen if n in rows):
            row = manifest.rows_of(table.slice(number, 1))[0]
            if row.id in found:
                _again(codec, row, found[row.id], report)
        progress(shard + 1, run.num_shards)
    return report


def _shard(
    folder: Path, shard: int, rows: pa.Table, settings: shards.Settings, report: Report
) -> dict[str, np.ndarray]:  # fmt: skip
    """The codes of a shard by id, none if it cannot be read. What is wrong is reported."""
    path, failed = shards.shard_path(folder, shard), shards.errors_path(folder, shard)
    try:
        made_with, table = shards.read_settings(path), pq.read_table(path)
        errors = pq.read_table(failed)["id"].to_pylist() if failed.exists() else []
    except (InputError, *shards.DAMAGED) as error:
        report.wrong.append(f"{path.name} cannot be read: {one_line(error)}")
        return {}
    if (difference := settings.difference(made_with)) is not None:
        report.wrong.append(f"{path.name} is of another run: {difference}")
    ids, wanted = table["id"].to_pylist(), rows["id"].to_pylist()
    report.rows, report.errors = report.rows + len(ids), report.errors + len(errors)
    there, failed_ids = set(ids), set(errors)
    if Counter([*ids, *errors]) != Counter(wanted):
        report.wrong.append(f"{path.name} does not have each row of the manifest once")
    elif ids != [name for name in wanted if name in there] or there & failed_ids:
        report.wrong.append(f"{path.name} does not have its rows in the order of the manifest")
    codes = shards.unpack_codes(table["codes"])
    for name, count, duration, row in zip(
        ids, table["n_frames"].to_pylist(), table["duration"].to_pylist(), codes, strict=True
    ):
        frames = -(-round(duration * settings.sample_rate) // settings.frame_size)
        if row.shape != (settings.num_codebooks, count) or count != frames:
            report.wrong.append(f"{path.name}: {shown(name)} has codes {row.shape} for {duration:g} s")
        elif row.min() < 0 or row.max() >= settings.codebook_size:
            report.wrong.append(f"{path.name}: {shown(name)} has codes outside [0, {settings.codebook_size})")
    return dict(zip(ids, codes, strict=True))


def _again(codec: Codec, row: Row, codes: np.ndarray, report: Report) -> None:
    try:
        audio = reading.samples(row, codec.sample_rate, codec.config.audio_channels)
    except InputError as error:
        report.unreadable.append(str(error))
        return
    with torch.inference_mode():
        again = codec.encode(torch.from_numpy(audio.T.copy())[None])[0].cpu().numpy()
    report.checked += 1
    if again.shape != codes.shape:
        report.wrong.append(f"{shown(row.id)} has {codes.shape[1]} frames, and {again.shape[1]} when encoded again")
    elif (different := int((again != codes).sum())) > 0:
        report.wrong.append(f"{shown(row.id)} has {different} of {codes.size} codes that differ when encoded again")
