"""Manifests: the table of all rows of a corpus, and its files in Parquet, JSONL and CSV.

A manifest has the columns of `COLUMNS`; all others are carried through to the table of codes. A file needs only `id`
and `uri`. What is relative in it is relative to its folder. CSV has no types: there, carried columns are text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ..errors import InputError, named, one_line, shown
from ..io.files import check_input, check_output, path_of, replacing
from ..models.validation import json_object
from . import shards
from .reading import duration_of
from .rows import Row

COLUMNS = pa.schema(
    {
        "id": pa.string(),  # unique
        "uri": pa.string(),
        "start": pa.float64(),  # seconds in the file; null: its begin
        "end": pa.float64(),
        "channel": pa.int16(),  # from 0; null: the mean of all
        "duration": pa.float64(),  # seconds, of the section; null: not known before it is read
        "sample_rate": pa.int32(),  # Hz, of the file
    }
)
SUFFIXES = {".parquet", ".jsonl", ".csv"}
PROBING = 16  # threads
CHUNK = 4096  # rows that are Python objects at a time
Progress = Callable[[int, int], None]  # rows done, rows in all


def of_rows(rows: Iterable[Row]) -> pa.Table:
    """The manifest of rows, without durations. Raises InputError for what `checked` refuses."""
    tables, rows = [], iter(rows)
    while some := [*islice(rows, CHUNK)]:
        tables.append(
            _of_values([{**row.carried, "id": row.id, "uri": row.uri, "start": row.start, "end": row.end,
                         "channel": row.channel} for row in some], "the source")
        )  # fmt: skip
    if not tables:
        raise InputError("the source has no rows")
    return checked(pa.concat_tables(tables, promote_options="permissive"), "the source")


def read(path: str | Path) -> pa.Table:
    """The manifest in a file, its columns of the types of `COLUMNS`, absolute paths in it.

    Raises InputError for a damaged file, missing or repeated ids, columns of wrong types, or nested carried ones.
    """
    path = check_input(path_of(path, "a manifest"))
    readers = {".parquet": pq.read_table, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise InputError(f"a manifest must end in .parquet, .jsonl or .csv, got {path}")
    try:
        table = readers[path.suffix.lower()](path)
        table.validate(full=True)  # text that is not UTF-8
    except shards.DAMAGED as error:
        raise InputError(f"{path} is damaged ({one_line(error)})") from None
    table = checked(table, str(path))
    folder = path.resolve().parent
    uris = [uri if "://" in uri else str(folder / uri) for uri in table["uri"].to_pylist()]
    return table.set_column(table.schema.get_field_index("uri"), COLUMNS.field("uri"), pa.array(uris, pa.string()))


def write(table: pa.Table, path: str | Path) -> None:
    """Write a manifest in the format of the file's suffix, atomically."""
    path = writable(path)
    with replacing(path, durable=True) as part:
        match path.suffix.lower():
            case ".parquet":
                pq.write_table(table, part, compression="zstd")
            case ".csv":
                pyarrow.csv.write_csv(table, part)
            case _:
                with open(part, "w", encoding="utf-8") as file:
                    for batch in table.to_batches(CHUNK):
                        file.writelines(_line(values) for values in batch.to_pylist())


def writable(path: str | Path) -> Path:
    """Where a manifest can be written. Raises InputError for another suffix, and where no file can be written."""
    path = check_output(path_of(path, "a manifest"))
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a manifest must end in .parquet, .jsonl or .csv, got {path}")
    return path


def checked(table: pa.Table, where: str) -> pa.Table:
    """The table with the columns of `COLUMNS` and then the carried ones.

    Raises InputError naming the row or the column, and `where` it is from.
    """
    for name in ("id", "uri"):
        if name not in table.column_names:
            raise InputError(
                f"{where} must have the columns id and uri, got {', '.join(map(named, table.column_names))}"
            )
    carried = [column for column in table.schema if column.name not in COLUMNS.names]
    for column in carried:
        if column.name in shards.COLUMNS.names:
            raise InputError(f"{where} has a column {column.name}, a name that the table of codes uses itself")
        if not (is_scalar(column.type) or pa.types.is_null(column.type)):
            raise InputError(f"{where} has a column {named(column.name)} of {column.type}: only scalars are carried")
    columns = {c.name: _cast(table, c, where) for c in COLUMNS}
    columns |= {c.name: _carried(table[c.name], c.type) for c in carried}
    table = pa.table(columns).combine_chunks()
    for name in ("id", "uri"):
        missing = pc.fill_null(pc.equal(table[name], ""), True)
        _refuse(table, missing, f"{where}: {name} must not be empty")
    if table.num_rows == 0:
        raise InputError(f"{where} has no rows")
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        counts = pc.value_counts(table["id"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        raise InputError(f"{where}: ids must be unique, and {shown(repeated[0]['values'].as_py())} is there "
                         f"{repeated[0]['counts']} times")  # fmt: skip
    start, end = pc.fill_null(table["start"], 0.0), table["end"]
    _refuse(
        table, pc.invert(pc.and_(pc.is_finite(start), pc.greater_equal(start, 0.0))), f"{where}: start must be >= 0"
    )
    after = pc.and_(pc.is_finite(end), pc.greater(end, start))
    _refuse(table, pc.invert(pc.fill_null(after, True)), f"{where}: end must be after start")
    _refuse(table, pc.fill_null(pc.less(table["channel"], 0), False), f"{where}: channel must be >= 0")
    return table


def with_durations(table: pa.Table, progress: Progress = lambda done, total: None) -> pa.Table:
    """The manifest with the durations that it lacks, from the headers of the files; null where one cannot be read."""
    known = pc.is_valid(table["duration"])
    both = pc.and_(pc.is_valid(table["start"]), pc.is_valid(table["end"]))
    duration = pc.coalesce(table["duration"], pc.if_else(both, pc.subtract(table["end"], table["start"]), None))
    rate = table["sample_rate"].to_pylist()
    values, missing = duration.to_pylist(), pc.invert(pc.or_(known, both)).to_pylist()
    wanted = [i for i, is_missing in enumerate(missing) if is_missing]
    with ThreadPoolExecutor(PROBING) as pool:
        for begin in range(0, len(wanted), CHUNK):
            some = wanted[begin : begin + CHUNK]
            found = pool.map(duration_of, rows_of(table.take(some)))
            for done, (i, probed) in enumerate(zip(some, found, strict=True), begin + 1):
                if probed is not None:
                    values[i], rate[i] = probed
                progress(done, len(wanted))
    columns = {"duration": pa.array(values, pa.float64()), "sample_rate": pa.array(rate, pa.int32())}
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), COLUMNS.field(name), column)
    return table


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a manifest, or of a slice of one."""
    own = set(COLUMNS.names)
    return [
        Row(row["id"], row["uri"], row["start"], row["end"], row["channel"],
            {name: value for name, value in row.items() if name not in own})
        for row in table.to_pylist()
    ]  # fmt: skip


def digest(table: pa.Table) -> str:
    """The sha256 of what a manifest asks for: of all columns but those that `with_durations` fills in.

    It is the same in every format of the file and with every version of pyarrow.
    """
    table = table.drop(["duration", "sample_rate"])
    found = hashlib.sha256(str([(column.name, str(column.type)) for column in table.schema]).encode())
    for batch in table.to_batches(CHUNK * 16):
        buffer = pa.BufferOutputStream()
        pyarrow.csv.write_csv(batch, buffer, pyarrow.csv.WriteOptions(include_header=False))
        found.update(buffer.getvalue())
    return found.hexdigest()


# Formats


def _read_jsonl(path: Path) -> pa.Table:
    tables, lines = [], _objects(path)
    while some := [*islice(lines, CHUNK)]:
        tables.append(_of_values(some, str(path)))
    if not tables:
        raise InputError(f"{path} has no rows")
    return pa.concat_tables(tables, promote_options="permissive")


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if (value := json_object(line)) is None:
                raise InputError(f"{path}: line {number} is not a JSON object")
            yield value


def _of_values(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    """A table of rows that may lack columns. Raises InputError for a column of mixed types."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name == "id":
            values = [str(value) if type(value) is int else value for value in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise InputError(f"{where}: column {named(name)} must be of one type ({one_line(error)})") from None
    return pa.table(columns)


def _read_csv(path: Path) -> pa.Table:
    with open(path, "rb") as file:
        header = pyarrow.csv.open_csv(file).schema.names
    types = {name: pa.string() for name in header} | {c.name: c.type for c in COLUMNS}
    options = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    return pyarrow.csv.read_csv(path, convert_options=options)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in values.items() if value is not None}, ensure_ascii=False) + "\n"


# Columns


def is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return is_scalar(kind.value_type)
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(check(kind) for check in checks)


def _cast(table: pa.Table, column: pa.Field, where: str) -> pa.ChunkedArray | pa.Array:
    if column.name not in table.column_names:
        return pa.nulls(table.num_rows, column.type)
    try:
        return table[column.name].cast(column.type)
    except pa.ArrowException as error:
        raise InputError(f"{where}: column {column.name} must be {column.type} ({one_line(error)})") from None


def _carried(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Text as string, whatever stores it; a column of nothing is text."""
    is_text = pa.types.is_dictionary(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    return values.cast(pa.string()) if is_text else values


def _refuse(table: pa.Table, wrong: Any, message: str) -> None:
    if pc.any(wrong).as_py():
        row = table.filter(wrong).slice(0, 1).to_pylist()[0]
        told = {name: row[name] for name in ("id", "uri", "start", "end", "channel") if row[name] is not None}
        raise InputError(f"{message}, got {shown(told)}")
