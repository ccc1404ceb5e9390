"""Manifests: the three formats say the same; ids, sections and carried columns are checked; durations are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from fastmimi.corpus import manifest
from fastmimi.corpus.rows import Row
from fastmimi.errors import InputError

ROWS = [
    Row("a", "/x/a.wav", carried={"speaker": "0012", "text": 'say "é", twice', "snr": 1.5, "clean": True}),
    Row("b", "s3://x/b.flac", 0.25, 1.75, 1, {"speaker": None, "text": "", "snr": None, "clean": False}),
]


def test_rows_are_read_back(tmp_path: Path) -> None:
    table = manifest.of_rows(ROWS)
    assert manifest.rows_of(table) == ROWS
    for suffix in ("parquet", "jsonl"):
        path = tmp_path / f"m.{suffix}"
        manifest.write(table, path)
        read = manifest.read(path)
        assert manifest.rows_of(read) == ROWS
        assert manifest.digest(read) == manifest.digest(table)


def test_csv_carries_text(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    manifest.write(manifest.of_rows(ROWS), path)
    read = manifest.rows_of(manifest.read(path))
    assert [(row.id, row.uri, row.start, row.end, row.channel) for row in read] == [
        (row.id, row.uri, row.start, row.end, row.channel) for row in ROWS
    ]
    assert read[0].carried == {"speaker": "0012", "text": 'say "é", twice', "snr": "1.5", "clean": "true"}


def test_a_file_needs_only_ids_and_uris(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,id\na.wav,007\nsub/b.wav,x\n")
    (tmp_path / "m.jsonl").write_text('{"id": 7, "uri": "a.wav"}\n\n{"id": "x", "uri": "sub/b.wav"}\n')
    for name, first in (("m.csv", "007"), ("m.jsonl", "7")):
        rows = manifest.rows_of(manifest.read(tmp_path / name))
        assert [row.id for row in rows] == [first, "x"]
        assert [row.uri for row in rows] == [str(tmp_path / "a.wav"), str(tmp_path / "sub/b.wav")]


@pytest.mark.parametrize("column, other", [("id", "z"), ("uri", "z"), ("start", 0.5), ("channel", 1), ("speaker", "z")])
def test_the_digest_sees_every_column(column: str, other: object) -> None:
    values = {"id": "a", "uri": "u", "start": None, "end": 2.0, "channel": None, "speaker": None}
    tables = [manifest.checked(pa.table({k: [v] for k, v in {**values, column: x}.items()}), "m")
              for x in (values[column], other)]  # fmt: skip
    assert manifest.digest(tables[0]) != manifest.digest(tables[1])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "a"}], "must have the columns id and uri, got id"),
        ([{"id": "a", "uri": "x"}, {"id": "a", "uri": "y"}], "ids must be unique, and 'a' is there 2 times"),
        ([{"id": "a", "uri": "x"}, {"id": None, "uri": "y"}], "id must not be empty"),
        ([{"id": "a", "uri": ""}], "uri must not be empty"),
        ([{"id": "a", "uri": "x", "start": -1}], "start must be >= 0, got {'id': 'a'"),
        ([{"id": "a", "uri": "x", "start": 2, "end": 2}], "end must be after start"),
        ([{"id": "a", "uri": "x", "channel": -1}], "channel must be >= 0"),
        ([{"id": "a", "uri": "x", "start": "soon"}], "column start must be double"),
        ([{"id": "a", "uri": "x", "codes": "y"}], "has a column codes, a name that the table of codes uses"),
        ([{"id": "a", "uri": "x", "words": ["y"]}], "has a column words of list.*only scalars are carried"),
        ([{"id": "a", "uri": "x", "n": 1}, {"id": "b", "uri": "x", "n": "1"}], "column n must be of one type"),
        ([], "has no rows"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) or "\n")
    with pytest.raises(InputError, match=message):
        manifest.read(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.txt", b"id,uri\n", "must end in .parquet, .jsonl or .csv"),
        ("m.jsonl", b'{"id": "a", "uri": "x"}\n[1]\n', "line 2 is not a JSON object"),
        ("m.jsonl", b"\xff\xfe\n", "is damaged"),
        ("m.csv", b"id,uri\na,b,c\n", "is damaged"),
        ("m.csv", b"id,uri\n", "has no rows"),
        ("m.parquet", b"PAR1 no more", "is damaged"),
        ("m.parquet", b"", "is empty"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        manifest.read(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        manifest.read(tmp_path / f"absent-{name}")


def test_durations_are_those_of_the_sections(tmp_path: Path) -> None:
    path = str(tmp_path / "a.wav")
    soundfile.write(path, np.zeros(24_000, np.float32), 16_000)
    rows = [Row("all", path), Row("cut", path, 0.5, 1.25), Row("rest", path, 0.5), Row("none", path + "x")]
    seen: list[tuple[int, int]] = []
    table = manifest.with_durations(manifest.of_rows(rows), lambda done, total: seen.append((done, total)))
    assert table["duration"].to_pylist() == [1.5, 0.75, 1.0, None]
    assert table["sample_rate"].to_pylist() == [16_000, None, 16_000, None]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    known = manifest.checked(pa.table({"id": ["a"], "uri": [path], "duration": [9.0]}), "m")
    assert manifest.with_durations(known)["duration"].to_pylist() == [9.0]


def test_many_rows_and_columns_that_begin_empty(tmp_path: Path) -> None:
    count = manifest.CHUNK + 10
    rows = [Row(str(i), "x", carried={"late": "y"} if i > manifest.CHUNK else {"late": None}) for i in range(count)]
    table = manifest.of_rows(rows)
    assert table.schema.field("late").type == pa.string()
    manifest.write(table, tmp_path / "m.jsonl")
    assert manifest.digest(manifest.read(tmp_path / "m.jsonl")) != ""
    assert manifest.read(tmp_path / "m.jsonl")["id"].to_pylist() == [str(i) for i in range(count)]
    assert table.num_rows == pq.read_table(_written(table, tmp_path / "m.parquet")).num_rows


def _written(table: pa.Table, path: Path) -> Path:
    manifest.write(table, path)
    return path
