"""`verify` finds what is wrong with a folder of codes."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import fastmimi
from fastmimi.corpus.verify import verify
from fastmimi.devtools.testing import small_model
from fastmimi.errors import InputError


@pytest.fixture
def out(speech: Path, tmp_path: Path, codec: fastmimi.Mimi) -> Path:
    fastmimi.tokenize(speech, tmp_path / "codes", model=codec, rows_per_shard=5, progress=False)
    return tmp_path / "codes"


def other_codes(table: pa.Table) -> pa.Table:
    values = table["codes"].to_pylist()
    values[0][0][0] = (values[0][0][0] + 1) % 64
    return table.set_column(1, table.schema.field(1), pa.array(values, table.schema.field(1).type))


def codes_out_of_range(table: pa.Table) -> pa.Table:
    values = table["codes"].to_pylist()
    values[0][0][0] = 64
    return table.set_column(1, table.schema.field(1), pa.array(values, table.schema.field(1).type))


def other_settings(table: pa.Table) -> pa.Table:
    text = table.schema.metadata[b"fastmimi"].decode().replace('"float32"', '"bfloat16"')
    return table.replace_schema_metadata({"fastmimi": text})


def longer(table: pa.Table) -> pa.Table:
    return table.set_column(4, table.schema.field(4), pc.add(table["duration"], 1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.slice(1), "does not have each row of the manifest once"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "does not have each row of the manifest once"),
        (lambda table: table.take([1, 0, *range(2, len(table))]), "its rows in the order of the manifest"),
        (other_codes, "1 of .* codes that differ when encoded again"),
        (codes_out_of_range, r"codes outside \[0, 64\)"),
        (other_settings, "is of another run: dtype is float32 there, bfloat16 here"),
        (longer, r"has codes \(6, \d+\) for"),
    ],
)
def test_what_is_wrong_is_named(out: Path, codec: fastmimi.Mimi, change, message: str) -> None:
    assert verify(out, codec, sample=100).wrong == []
    path = out / "shard-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    found = verify(out, codec, sample=100)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(found.wrong))
    assert all("shard-00001" in text or "encoded again" in text for text in found.wrong)


def test_what_is_not_there(out: Path, codec: fastmimi.Mimi) -> None:
    os.unlink(pq.read_table(out / "shard-00000.parquet")["source"][0].as_py())
    (out / "shard-00001.parquet").unlink()
    (out / "shard-00002.parquet").write_bytes(b"PAR1")
    found = verify(out, codec, sample=100)
    assert (found.missing, found.checked, len(found.unreadable)) == (1, 4, 1)
    assert "does not exist" in found.unreadable[0]
    assert [text.partition(":")[0] for text in found.wrong] == ["shard-00002.parquet cannot be read"]


def test_other_models_and_folders_are_refused(out: Path, tmp_path: Path, codec: fastmimi.Mimi) -> None:
    with pytest.raises(InputError, match="was not made with this model: fingerprint is"):
        verify(out, small_model(seed=1))
    with pytest.raises(InputError, match=r"settings\.json does not exist"):
        verify(tmp_path, codec)
    with pytest.raises(InputError, match="sample must be an integer >= 0, got -1"):
        verify(out, codec, sample=-1)
