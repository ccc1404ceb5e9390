"""Read the codes of a corpus: all shards of a folder as one table, and its rows as records.

A record is a dictionary: `id`, `codes` [K, T] as a numpy array, and the other columns of the row under their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, one_line, shown
from ..io.files import check_input, path_of
from .shards import Settings, read_settings, shard_files, unpack_codes

Source = str | Path | Iterable[str | Path]
Record = dict[str, Any]


class RowGroup(NamedTuple):
    """The unit that is read at once: a part of a file."""

    file: Path
    number: int  # in the file
    rows: int


class CodesTable:
    """The finished shards of a corpus, which were all made with the same codec.

    Only the footers of the files are read here; `records` and `table` read rows.

    Args:
        source: the output folder of `fastmimi tokenize`, one shard, or several shards.

    Attributes:
        files: the shards, in order.
        settings: of the codec that made the codes.
        groups: the row groups of all files, in order.
        columns: the names of all columns.

    Raises InputError if there is no shard, one is not a table of codes, or two were made with different codecs.
    """

    def __init__(self, source: Source):
        self.files = _files(source)
        self.settings = read_settings(self.files[0])
        self.columns = pq.read_schema(self.files[0]).names
        self.groups: list[RowGroup] = []
        for file in self.files:
            meta = pq.read_metadata(file)
            difference = self.settings.difference(read_settings(file)) or self._other_columns(meta.schema)
            if difference:
                raise InputError(f"{self.files[0]} and {file} are not of one corpus: {difference}")
            self.groups += [
                RowGroup(file, number, meta.row_group(number).num_rows) for number in range(meta.num_row_groups)
            ]

    def __len__(self) -> int:
        """The number of rows."""
        return sum(group.rows for group in self.groups)

    @property
    def seconds(self) -> float:
        """The duration of all rows; their `duration` column is read."""
        return sum(float(self.table(group, ["duration"])["duration"].to_numpy().sum()) for group in self.groups)

    def _other_columns(self, schema: pq.ParquetSchema) -> str:
        names = schema.to_arrow_schema().names
        return "" if names == self.columns else f"columns are {', '.join(self.columns)} there, {', '.join(names)} here"

    def selected(self, columns: Sequence[str] | None) -> list[str]:
        """The columns to read: `id`, `codes` and those named, or all. Raises InputError for one that is not there."""
        if columns is None:
            return list(self.columns)
        if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
            raise InputError(f"columns must be a list of names, got {shown(columns)}")
        for name in columns:
            if name not in self.columns:
                raise InputError(f"there is no column {shown(name)}; there are {', '.join(self.columns)}")
        return list(dict.fromkeys(["id", "codes", *columns]))

    def codebooks(self, count: int | None) -> int:
        """The number of codebooks to read, all for None. Raises InputError for one that is not in the table."""
        most = self.settings.num_codebooks
        if count is None:
            return most
        if type(count) is not int or not 1 <= count <= most:
            raise InputError(f"the number of codebooks must be from 1 to {most}, got {shown(count)}")
        return count

    def table(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """A row group as an Arrow table."""
        try:  # threads of Arrow do not survive the fork of a DataLoader
            with pq.ParquetFile(group.file) as file:
                return file.read_row_group(group.number, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{group.file} is damaged ({one_line(error)})") from None

    def records(
        self, group: RowGroup, columns: Sequence[str] | None = None, num_codebooks: int | None = None,
        dtype: np.dtype | type = np.int16,
    ) -> list[Record]:  # fmt: skip
        """The rows of a row group, each with its own copy of its codes [K, T]."""
        table, count = self.table(group, self.selected(columns)), self.codebooks(num_codebooks)
        others = table.drop_columns(["codes"]).to_pylist()
        every = unpack_codes(table.column("codes"))
        return [{**row, "codes": codes[:count].astype(dtype)} for row, codes in zip(others, every, strict=True)]


def read_codes(
    source: Source, *, num_codebooks: int | None = None, columns: Sequence[str] | None = None, shuffle: bool = False,
    seed: int = 0, dtype: np.dtype | type = np.int16,
) -> Iterator[Record]:  # fmt: skip
    """Iterate over the utterances of a tokenised corpus.

    Args:
        source: the output folder of `fastmimi tokenize`, one shard, or several shards.
        num_codebooks: read only the first codebooks; by default all.
        columns: further columns to read beside `id` and `codes`; by default all.
        shuffle: read the row groups in a random order, and the rows within each; otherwise in the manifest's order.
        seed: of the random order.
        dtype: of the codes.

    Yields dictionaries with `id`, `codes` [K, T], and the other columns: `n_frames`, `num_codebooks` (of the table),
    `duration` (s), `sample_rate` (Hz), `source`, `start`, `end`, `channel`, and those that the manifest had.
    Memory holds one row group. Raises InputError, at once, if the source or an argument is invalid.
    """
    table = CodesTable(source)
    names, count = table.selected(columns), table.codebooks(num_codebooks)
    return _records(table, names, count, np.random.default_rng(seed) if shuffle else None, dtype)


def _records(
    table: CodesTable, names: list[str], count: int, draw: np.random.Generator | None, dtype: np.dtype | type
) -> Iterator[Record]:
    for group in table.groups if draw is None else (table.groups[i] for i in draw.permutation(len(table.groups))):
        rows = table.records(group, names, count, dtype)
        yield from rows if draw is None else (rows[i] for i in draw.permutation(len(rows)))


def samples_of(row: Record, settings: Settings) -> int:
    """The length of a row's audio at the codec's rate: what its duration says, within its last frame."""
    most = row["codes"].shape[1] * settings.frame_size
    return min(most, max(most - settings.frame_size + 1, math.floor(row["duration"] * settings.sample_rate + 0.5)))


def _files(source: Source) -> list[Path]:
    if isinstance(source, Iterable) and not isinstance(source, str):
        files = [check_input(path_of(file, "a shard")) for file in source]
        if not files:
            raise InputError("there are no shards: the list is empty")
        return files
    path = path_of(source, "source")
    if not path.is_dir():
        return [check_input(path)]
    return shard_files(path)
