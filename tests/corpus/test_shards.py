"""Shards and settings: what is written is read back, what is damaged or of another run is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmimi.errors import InputError

pa = pytest.importorskip("pyarrow", reason="corpora need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="corpora need pyarrow")

from fastmimi.corpus import shards  # noqa: E402 (it needs pyarrow)

SETTINGS = shards.Settings("random:0", "f" * 16, "e" * 16, 3, 64, "float32", 12.5, 24_000, 1920)
RUN = shards.Run(SETTINGS, "speech", 2500, "m" * 64, 1000)


def codes_of(*shapes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 64, shape, dtype=np.int64) for shape in shapes]


def table(codes: list[np.ndarray]) -> pa.Table:
    rows = [
        {"id": f"é/{i}", "duration": 0.5 * i, "sample_rate": 24_000, "source": "a.wav", "start": None, "end": 1.5,
         "channel": None, "speaker": None if i else "x"}
        for i in range(len(codes))
    ]  # fmt: skip
    return shards.table_of(rows, codes, shards.schema(SETTINGS, [pa.field("speaker", pa.string())]))


@pytest.mark.parametrize("shapes", [[], [(3, 1)], [(3, 7), (3, 1), (3, 12)]], ids=len)
def test_a_shard_is_read_back(tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    codes = codes_of(*shapes)
    shards.write_shard(tmp_path, 4, table(codes), [])
    read = pq.read_table(tmp_path / "shard-00004.parquet")
    assert read.schema.names == [*shards.COLUMNS.names, "speaker"]
    assert [column.name for column in shards.carried_of(read.schema)] == ["speaker"]
    found = shards.unpack_codes(read["codes"])
    assert all(row.dtype == np.int16 for row in found)
    assert [row.tolist() for row in found] == [row.tolist() for row in codes]
    assert read["codes"].to_pylist() == [row.tolist() for row in codes]
    assert read["n_frames"].to_pylist() == [row.shape[1] for row in codes]
    assert shards.read_settings(tmp_path / "shard-00004.parquet") == SETTINGS
    assert not (tmp_path / "errors").exists()


def test_slices_of_a_column_are_unpacked() -> None:
    codes = codes_of((3, 7), (3, 1), (3, 12), (3, 2))
    column = shards.pack_codes(codes)
    assert [row.tolist() for row in shards.unpack_codes(column[1:3])] == [row.tolist() for row in codes[1:3]]
    chunked = pa.chunked_array([column[:1], column[3:]])
    assert [row.tolist() for row in shards.unpack_codes(chunked)] == [codes[0].tolist(), codes[3].tolist()]


def test_shards_are_listed_by_number(tmp_path: Path) -> None:
    for name in ("shard-100000.parquet", "shard-00002.parquet", "shard-00010.parquet", "errors.parquet", ".x.part"):
        (tmp_path / name).touch()
    found = [path.name for path in shards.shard_files(tmp_path)]
    assert found == ["shard-00002.parquet", "shard-00010.parquet", "shard-100000.parquet"]


def test_errors_are_joined(tmp_path: Path) -> None:
    shards.write_shard(tmp_path, 0, table([]), [("a", "a.wav", "a.wav is empty")])
    shards.write_shard(tmp_path, 1, table([]), [])
    shards.write_shard(tmp_path, 2, table([]), [("c", "c.wav", "c.wav is empty")])
    assert shards.join_errors(tmp_path, 3) == 2
    assert pq.read_table(tmp_path / "errors.parquet")["id"].to_pylist() == ["a", "c"]
    shards.write_shard(tmp_path, 0, table([]), [])  # done again, without errors
    assert shards.join_errors(tmp_path, 3) == 1


def test_settings_are_read_back(tmp_path: Path) -> None:
    RUN.write(tmp_path)
    assert shards.Run.read(tmp_path) == RUN
    assert json.loads((tmp_path / "settings.json").read_text())["num_shards"] == RUN.num_shards == 3
    assert [RUN.rows_of(0), RUN.rows_of(2)] == [range(1000), range(2000, 2500)]


def test_differences_are_named() -> None:
    assert RUN.difference(replace(RUN, source="elsewhere", settings=replace(SETTINGS, model="./a"))) is None
    assert RUN.difference(replace(RUN, rows_per_shard=10)) == "rows_per_shard is 1000 there, 10 here"
    other = replace(RUN, settings=replace(SETTINGS, num_codebooks=8))
    assert RUN.difference(other) == "num_codebooks is 3 there, 8 here"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 9}, "is of version 9; only 1 can be read"),
        ({"num_codebooks": "3"}, "num_codebooks must be of type int, got '3'"),
        ({"rows": None}, "rows must be of type int, got None"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    RUN.write(tmp_path)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=rf"settings\.json.* {message}"):
        shards.Run.read(tmp_path)
    path.write_text("[")
    with pytest.raises(InputError, match="not a JSON object"):
        shards.Run.read(tmp_path)


def test_other_files_are_no_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished shard"):
        shards.shard_files(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        shards.shard_files(tmp_path / "absent")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a Parquet file"):
        shards.read_settings(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="not a table of codes"):
        shards.read_settings(tmp_path / "b.parquet")
