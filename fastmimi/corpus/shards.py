"""The output folder of a run: its settings, and shards of codes in Parquet.

    settings.json                what the run is, `Run`
    manifest.parquet             the manifest that was planned
    shard-00000.parquet ...      rows in the order of the manifest; a shard that exists is finished
    errors/shard-00000.parquet   the rows of that shard that could not be read or encoded, and why, if there are any
    errors.parquet               the same of all shards, when the last one is finished

The columns of a shard are those of `COLUMNS`, then those that the manifest carries. `codes` is a list of codebooks,
each a list of frames. The schema's metadata has the key "fastmimi", whose value is JSON: the fields of `Settings`, and
"package", the version of fastmimi that wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, named, one_line, shown
from ..io.files import check_input, path_of, replacing
from ..models.validation import json_object

if TYPE_CHECKING:
    from ..models.codec import Codec

VERSION = 1
KEY = b"fastmimi"
LARGEST_CODEBOOK = 1 << 15  # entries that int16 can number
DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises for damaged files
SETTINGS, MANIFEST, ERRORS = "settings.json", "manifest.parquet", "errors.parquet"
COLUMNS = pa.schema(
    {
        "id": pa.string(),
        "codes": pa.list_(pa.list_(pa.int16())),  # [num_codebooks][n_frames]
        "n_frames": pa.int32(),
        "num_codebooks": pa.int16(),
        "duration": pa.float64(),  # seconds
        "sample_rate": pa.int32(),  # Hz, of the audio that was encoded and that codes decode to
        "source": pa.string(),
        "start": pa.float64(),  # seconds in the source
        "end": pa.float64(),
        "channel": pa.int16(),
    }
)
ERROR_COLUMNS = pa.schema({"id": pa.string(), "uri": pa.string(), "error": pa.string()})


@dataclass(frozen=True)
class Settings:
    """What made the codes of a table; equal settings make equal codes of equal audio.

    fingerprint: of the quantizer's weights (`checkpoints.weights.fingerprint`): who has the same can decode the codes.
    encoder: of the encoder's weights as they were loaded.
    """

    model: str
    fingerprint: str
    encoder: str
    num_codebooks: int
    codebook_size: int
    dtype: str
    frame_rate: float  # Hz
    sample_rate: int  # Hz
    frame_size: int  # samples
    version: int = VERSION

    @classmethod
    def of(cls, codec: Codec, model: str) -> Settings:
        """Of a codec that was loaded from `model`. Raises InputError if its codes do not fit into int16."""
        from ..checkpoints import weights

        config = codec.config
        if config.codebook_size > LARGEST_CODEBOOK:
            raise InputError(f"codebooks may have {LARGEST_CODEBOOK} entries in a table, got {config.codebook_size}")
        return cls(
            model, weights.fingerprint(codec), weights.fingerprint_of_encoder(codec), codec.num_codebooks,
            config.codebook_size, str(codec.dtype).removeprefix("torch."), codec.frame_rate, codec.sample_rate,
            codec.frame_size,
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Settings:
        """Raises InputError, naming the file it was read from, if the text is damaged or of another version."""
        return _from_json(cls, text, where)

    def difference(self, other: Settings) -> str | None:
        """What distinguishes two settings, such as "num_codebooks is 8 there, 4 here"; the model's name may differ."""
        return _difference(self, other, ignored={"model"})


@dataclass(frozen=True)
class Run:
    """What a folder is the output of: the settings, and how which rows are divided into shards."""

    settings: Settings
    source: str  # as the user named it, absolute where it is a path
    rows: int
    manifest: str  # sha256 of its contents, `manifest.digest`
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """Which rows of the manifest are in a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def write(self, folder: Path) -> None:
        values = {**asdict(self.settings), **{f.name: getattr(self, f.name) for f in fields(self)[1:]}}
        with _written(folder / SETTINGS) as part:
            part.write_text(json.dumps({**values, "num_shards": self.num_shards}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises InputError if the folder has no settings, or damaged ones."""
        path = check_input(folder / SETTINGS)
        values = _parsed(path.read_bytes(), path)
        kinds = {"source": str, "rows": int, "manifest": str, "rows_per_shard": int}
        return cls(Settings.from_json(path.read_bytes(), path), **_fields(values, kinds, path))

    def difference(self, other: Run) -> str | None:
        """What distinguishes two runs; a manifest is known by its contents, whatever its name."""
        return self.settings.difference(other.settings) or _difference(self, other, ignored={"settings", "source"})


# Names


def shard_name(shard: int) -> str:
    return f"shard-{shard:05}.parquet"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / shard_name(shard)


def errors_path(folder: Path, shard: int) -> Path:
    return folder / "errors" / shard_name(shard)


def shard_files(folder: str | Path) -> list[Path]:
    """The finished shards of a folder, in order. Raises InputError if there are none."""
    folder = path_of(folder, "a folder of codes")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))]
    if not numbered:
        raise InputError(f"{folder} holds no finished shard of codes, such as {shard_name(0)}")
    return [path for _, path in sorted(numbered)]


_SHARD = re.compile(r"shard-(\d{5,})\.parquet")


# Tables


def schema(settings: Settings, carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """The schema of a shard, with its metadata."""
    told = json.dumps({**asdict(settings), "package": version("fastmimi")})
    return pa.schema([*COLUMNS, *carried], metadata={KEY: told.encode()})


def carried_of(columns: pa.Schema) -> list[pa.Field]:
    """The fields of a shard's or a manifest's schema that are carried."""
    known = {*COLUMNS.names, "uri"}
    return [column for column in columns if column.name not in known]


def table_of(rows: Sequence[Mapping[str, Any]], codes: Sequence[np.ndarray], columns: pa.Schema) -> pa.Table:
    """A shard of the rows, each with the values of all columns but `codes`, `n_frames` and `num_codebooks`.

    codes: of each row, [K, T] of any integer type.
    """
    given = {"codes": pack_codes(codes), "n_frames": [c.shape[1] for c in codes], "num_codebooks": [*map(len, codes)]}
    arrays = [
        given[column.name] if column.name == "codes"
        else pa.array(given.get(column.name) or [row[column.name] for row in rows], column.type)
        for column in columns
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=columns)


def pack_codes(codes: Sequence[np.ndarray]) -> pa.ListArray:
    """Codes [K, T] of each row as a column, list<list<int16>>."""
    flat = np.concatenate([np.zeros(0, np.int16), *(c.astype(np.int16).ravel() for c in codes)])
    frames = np.concatenate([np.zeros(1, np.int32), *(np.full(c.shape[0], c.shape[1], np.int32) for c in codes)])
    books = np.cumsum([0, *(c.shape[0] for c in codes)], dtype=np.int32)
    inner = pa.ListArray.from_arrays(pa.array(np.cumsum(frames, dtype=np.int32)), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(books), inner)


def unpack_codes(column: pa.ListArray | pa.ChunkedArray) -> list[np.ndarray]:
    """A column of codes -> [K, T] int16 of each row, views of one buffer; the inverse of `pack_codes`."""
    if isinstance(column, pa.ChunkedArray):
        return [codes for chunk in column.chunks for codes in unpack_codes(chunk)]
    inner = column.flatten()
    flat, frames = inner.flatten().to_numpy(zero_copy_only=False), np.diff(inner.offsets.to_numpy())
    books, found, start, book = np.diff(column.offsets.to_numpy()), [], 0, 0
    for count in books.tolist():
        length = int(frames[book]) if count else 0
        found.append(flat[start : start + count * length].reshape(count, length))
        start, book = start + count * length, book + count
    return found


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file: whole and on the disk, or not at all. Raises InputError if the disk is full."""
    with _written(path) as part:
        pq.write_table(table, part, compression="zstd")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with replacing(path, durable=True) as part:
            yield part
    except OSError as error:
        raise InputError(f"{path} cannot be written ({one_line(error)}); what is finished stays") from None


def write_shard(folder: Path, shard: int, table: pa.Table, errors: Sequence[tuple[str, str, str]]) -> None:
    """Write a finished shard, and before it the (id, uri, error) of those of its rows that failed."""
    path = errors_path(folder, shard)
    if errors:
        path.parent.mkdir(exist_ok=True)
        write_table(pa.Table.from_arrays([*map(pa.array, zip(*errors, strict=True))], schema=ERROR_COLUMNS), path)
    else:
        path.unlink(missing_ok=True)  # of a run that was stopped between the two files
    write_table(table, shard_path(folder, shard))


def join_errors(folder: Path, num_shards: int) -> int:
    """Write errors.parquet of all shards' errors; the number of its rows."""
    paths = [path for shard in range(num_shards) if (path := errors_path(folder, shard)).exists()]
    table = pa.concat_tables([ERROR_COLUMNS.empty_table(), *map(pq.read_table, paths)])
    write_table(table, folder / ERRORS)
    return table.num_rows


def finish(folder: Path, what: Run, alone: bool) -> None:
    """If all shards are there, join their errors; a job that is alone also removes what killed runs have left."""
    if all(shard_path(folder, shard).exists() for shard in range(what.num_shards)):
        join_errors(folder, what.num_shards)
        for left in folder.glob(".*.part") if alone else ():
            left.unlink(missing_ok=True)


def read_settings(path: str | Path) -> Settings:
    """The settings in a shard's metadata. Raises InputError if the file is not a shard, or damaged."""
    path = check_input(path_of(path, "a shard of codes"))
    try:
        metadata = pq.read_schema(path).metadata or {}
    except DAMAGED as error:
        raise InputError(f"{path} is not a Parquet file, or is damaged ({one_line(error)})") from None
    if KEY not in metadata:
        raise InputError(f"{path} is a Parquet file, but not a table of codes of fastmimi")
    return Settings.from_json(metadata[KEY], path)


# JSON


def _parsed(text: str | bytes, where: Path) -> dict[str, Any]:
    if (values := json_object(text)) is None:
        raise InputError(f"{where} is damaged: its settings are not a JSON object")
    return values


def _from_json(kind: type[Settings], text: str | bytes, where: Path) -> Settings:
    values = _parsed(text, where)
    if values.get("version") != VERSION:
        raise InputError(f"{where} is of version {named(values.get('version'))}; only {VERSION} can be read")
    types = {"str": str, "int": int, "float": float}
    return kind(**_fields(values, {f.name: types[str(f.type)] for f in fields(kind)}, where))


def _fields(values: dict[str, Any], kinds: Mapping[str, type], where: Path) -> dict[str, Any]:
    for name, kind in kinds.items():
        value = values.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"{where} is damaged: {name} must be of type {kind.__name__}, got {shown(value)}")
    return {name: values[name] for name in kinds}


def _difference(there: Any, here: Any, ignored: set[str]) -> str | None:
    pairs = [(f.name, getattr(there, f.name), getattr(here, f.name)) for f in fields(there) if f.name not in ignored]
    return next((f"{name} is {a} there, {b} here" for name, a, b in pairs if a != b), None)
