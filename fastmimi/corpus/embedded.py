"""Audio inside of other files: members of archives, rows of Parquet files and of Hugging Face data sets, objects of
stores; by URIs.

    tar://a/b.flac::/data/shard-0.tar            a member of an archive, as fsspec names it; so are zip:// and others
    row://17/audio::hf://datasets/x/y.parquet    row 17, column audio, of a Parquet file
    dataset://17/audio::x/y?split=train          row 17, column audio, of a data set that `datasets` loads
    s3://bucket/a.flac                           whatever fsspec opens

A column of audio has bytes, or structs of bytes and a path, as `datasets` stores them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any
from urllib.parse import parse_qsl

from ..errors import InputError

TABLES = ("row://", "dataset://")
CACHED_BYTES = 256 << 20  # of decompressed row groups, for each process
CHUNK = 1 << 20


def copy(uri: str, to: IO[bytes]) -> None:
    """Write the bytes at a URI to a file."""
    if uri.startswith(TABLES):
        to.write(_of_table(uri))
        return
    with opened(uri) as stream:
        while chunk := stream.read(CHUNK):
            to.write(chunk)


@contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """Open a URI of fsspec for reading; archives stay open, since their index takes a pass over them."""
    import fsspec

    inner, _, outer = uri.partition("::")
    scheme, _, member = inner.partition("://")
    if outer and scheme in ("tar", "zip"):
        with _archive(scheme, outer).open(member) as stream:
            yield stream
        return
    with fsspec.open(uri) as stream:
        yield stream


@cache
def _archive(scheme: str, uri: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme, fo=uri)


def _of_table(uri: str) -> bytes:
    scheme, _, rest = uri.partition("://")
    place, _, table = rest.partition("::")
    index, _, column = place.partition("/")
    value = (_parquet_value if scheme == "row" else _dataset_value)(table, int(index), column)
    found, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(found, bytes):
        return found
    if isinstance(path, str):
        with opened(path) as stream:
            return stream.read()
    raise InputError(f"{uri} holds no audio")


class _RecentlyUsed:
    """The last values of a function, up to a number of bytes; the last one is always kept."""

    def __init__(self, most: int):
        self._most, self._held = most, OrderedDict[tuple[Any, ...], Any]()

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        self._held.move_to_end(key)
        while len(self._held) > 1 and sum(value.nbytes for value in self._held.values()) > self._most:
            self._held.popitem(last=False)
        return self._held[key]


_row_groups = _RecentlyUsed(CACHED_BYTES)


def _parquet_value(uri: str, index: int, column: str) -> Any:
    file, starts = _parquet(uri)
    group = next(i for i in reversed(range(len(starts))) if starts[i] <= index)
    values = _row_groups.get((uri, group, column), lambda: file.read_row_group(group, columns=[column])[column])
    return values[index - starts[group]].as_py()


@cache
def _parquet(uri: str) -> tuple[Any, list[int]]:
    import fsspec
    import pyarrow.parquet as pq

    file = pq.ParquetFile(fsspec.open(uri).open())
    starts = [0]
    for group in range(file.num_row_groups - 1):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts


def _dataset_value(spec: str, index: int, column: str) -> Any:
    return dataset(spec, column)[index][column]


@cache
def dataset(spec: str, column: str) -> Any:
    """The data set "name?split=train&config=clean" of `datasets`, or of a folder of `save_to_disk`; audio not decoded.

    Raises InputError where there is none, or no such column.
    """
    from pathlib import Path

    import datasets

    name, _, query = spec.partition("?")
    options = dict(parse_qsl(query))
    if (Path(name) / "state.json").is_file():
        found = datasets.load_from_disk(name)
    else:
        found = datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"))
    if column not in found.column_names:
        raise InputError(f"{name} has no column {column!r}, only {', '.join(found.column_names)}")
    if isinstance(found.features[column], datasets.Audio):
        found = found.cast_column(column, datasets.Audio(decode=False))
    return found
