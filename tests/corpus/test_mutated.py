"""Mutated manifests, settings and shards are read, or refused with one line: no other exception."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmimi.corpus import manifest, shards
from fastmimi.corpus.rows import Row
from fastmimi.devtools.testing import result_or_none

SETTINGS = shards.Settings("random:0", "f" * 16, "e" * 16, 3, 64, "float32", 12.5, 24_000, 1920)
ROWS = [Row(f"é{i}", f"/x/{i}.wav", 0.5, 1.5, i, {"text": "a,b\n", "n": i, "x": 0.5, "b": True}) for i in range(3)]
EXAMPLES = settings(max_examples=150, derandomize=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from("sdi"), st.binary(min_size=1, max_size=6)), max_size=4
)


def mutated(whole: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    """Bytes set, deleted or inserted."""
    content = bytearray(whole)
    for at, how, what in changes:
        at %= len(content) + 1
        content[at : at + (0 if how == "i" else len(what))] = b"" if how == "d" else what
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@EXAMPLES
@given(changes=CHANGES)
def test_manifests(folder: Path, suffix: str, changes: list[tuple[int, str, bytes]]) -> None:
    whole, path = folder / f"whole.{suffix}", folder / f"m.{suffix}"
    if not whole.exists():
        manifest.write(manifest.of_rows(ROWS), whole)
    path.write_bytes(mutated(whole.read_bytes(), changes))
    table = result_or_none(lambda: manifest.read(path))
    if table is not None:
        assert len({row.id for row in manifest.rows_of(table)}) == table.num_rows
        manifest.digest(table)


@EXAMPLES
@given(rows=st.lists(st.dictionaries(st.sampled_from([*manifest.COLUMNS.names, "text", "codes"]), VALUES), max_size=3))
def test_values_in_a_manifest(folder: Path, rows: list[dict[str, object]]) -> None:
    path = folder / "v.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "uri": "x", **row}) + "\n" for i, row in enumerate(rows)) + "\n")
    table = result_or_none(lambda: manifest.read(path))
    if table is not None:
        manifest.digest(table)


@EXAMPLES
@given(changes=st.dictionaries(st.sampled_from(["version", "model", "frame_rate", "rows", "manifest"]), VALUES))
def test_settings(folder: Path, changes: dict[str, object]) -> None:
    shards.Run(SETTINGS, "speech", 10, "m" * 64, 5).write(folder)
    path = folder / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    result_or_none(lambda: shards.Run.read(folder))


@EXAMPLES
@given(changes=CHANGES)
def test_shards(folder: Path, changes: list[tuple[int, str, bytes]]) -> None:
    whole, path = folder / "whole-shard.parquet", folder / "shard-00000.parquet"
    if not whole.exists():
        pq.write_table(shards.table_of([], [], shards.schema(SETTINGS)), whole)
    path.write_bytes(mutated(whole.read_bytes(), changes))
    result_or_none(lambda: shards.read_settings(path))
