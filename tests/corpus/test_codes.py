"""Reading codes: the iterator, the Dataset, and tables that do not fit together."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fastmimi

pa = pytest.importorskip("pyarrow", reason="corpora need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="corpora need pyarrow")


def expected(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_records_are_the_rows_in_order(make_corpus) -> None:
    folder = make_corpus()
    found, rows = list(fastmimi.read_codes(folder)), expected(folder)
    assert [record["id"] for record in found] == [row["id"] for row in rows]
    for record, row in zip(found, rows, strict=True):
        codes = record.pop("codes")
        assert codes.dtype == np.int16 and codes.flags.writeable
        np.testing.assert_array_equal(codes, row.pop("codes"))
        assert record == row


def test_fewer_codebooks_and_columns(make_corpus) -> None:
    folder = make_corpus()
    for record, row in zip(
        fastmimi.read_codes(folder, num_codebooks=2, columns=["text"], dtype=np.int64), expected(folder), strict=True
    ):
        assert record.keys() == {"id", "codes", "text"} and record["codes"].dtype == np.int64
        np.testing.assert_array_equal(record["codes"], row["codes"][:2])


def test_shuffled_records_are_the_same_in_an_order_of_the_seed(make_corpus) -> None:
    folder = make_corpus()
    ids = [record["id"] for record in fastmimi.read_codes(folder)]
    orders = [[record["id"] for record in fastmimi.read_codes(folder, shuffle=True, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and ids not in orders
    assert all(sorted(order) == sorted(ids) for order in orders)
    many = [[record["id"] for record in fastmimi.read_codes(folder, shuffle=True, seed=seed)] for seed in range(20)]
    assert len({order.index(ids[0]) < order.index(ids[1]) for order in many}) == 2  # two rows of one row group


def test_shards_can_be_given_one_by_one(make_corpus) -> None:
    folder = make_corpus()
    shards = sorted(folder.glob("shard-*.parquet"))
    assert [record["id"] for record in fastmimi.read_codes(shards[1])] == [
        row["id"] for row in pq.read_table(shards[1]).to_pylist()
    ]
    assert len(list(fastmimi.read_codes(map(str, shards[:2])))) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_codebooks": 7}, "the number of codebooks must be from 1 to 6, got 7"),
        ({"num_codebooks": True}, "the number of codebooks must be from 1 to 6, got True"),
        ({"columns": ["words"]}, "there is no column 'words'; there are id, codes, n_frames"),
        ({"columns": "text"}, "columns must be a list of names, got 'text'"),
    ],
)
def test_invalid_arguments_are_refused_at_once(make_corpus, arguments, sentence: str) -> None:
    folder = make_corpus()
    for read in (fastmimi.read_codes, fastmimi.CodesDataset):
        with pytest.raises(fastmimi.InputError, match=sentence):
            read(folder, **arguments)


def test_invalid_sources_are_refused_at_once(make_corpus, tmp_path: Path) -> None:
    folder = make_corpus()
    shards = sorted(folder.glob("shard-*.parquet"))
    other = make_corpus("other", fingerprint="0123456789abcdef")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no table")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "plain.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(shards[0].read_bytes()[:-100])
    for source, part in (
        (tmp_path / "none", "none does not exist"),
        (tmp_path / "empty", "holds no finished shard"),
        ([], "the list is empty"),
        (tmp_path / "text.parquet", "text.parquet"),
        (tmp_path / "plain.parquet", "plain.parquet"),
        (cut, "cut.parquet"),
        (5, "got 5"),
        ([shards[0], next(other.glob("shard-*"))], "fingerprint is .* there, 0123456789abcdef here"),
    ):
        with pytest.raises(fastmimi.InputError, match=part):
            fastmimi.read_codes(source)


def test_a_damaged_shard_is_named_when_it_is_read(make_corpus) -> None:
    shard = make_corpus() / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[4:600] = bytes(596)
    shard.write_bytes(data)
    records = fastmimi.read_codes(shard)
    with pytest.raises(fastmimi.InputError, match=r"shard-00000\.parquet is damaged"):
        next(records)


def test_the_dataset_has_the_records_in_any_order(make_corpus) -> None:
    folder = make_corpus()
    data, rows = fastmimi.CodesDataset(folder, cached_groups=1, columns=["text"]), expected(folder)
    assert len(data) == len(rows)
    for i in (5, 0, 7, 1, 6, -1, -8, 3):
        assert data[i]["codes"].dtype == torch.int64 and data[i]["id"] == rows[i]["id"]
        assert data[i]["codes"].tolist() == rows[i]["codes"] and data[i]["text"] == rows[i]["text"]
    assert [item["id"] for item in data.__getitems__([6, 0, 6])] == [rows[i]["id"] for i in (6, 0, 6)]
    for i in (8, -9):
        with pytest.raises(IndexError, match="8 utterances"):
            data[i]
    assert len(data._cache) == 1 and pickle.loads(pickle.dumps(data))._cache == {}
    with pytest.raises(fastmimi.InputError, match="cached_groups must be positive, got 0"):
        fastmimi.CodesDataset(folder, cached_groups=0)


def test_items_are_independent(make_corpus) -> None:
    data = fastmimi.CodesDataset(make_corpus())
    data[1]["codes"].zero_()
    assert data[1]["codes"].any()


def test_a_batch_is_padded(make_corpus) -> None:
    data = fastmimi.CodesDataset(make_corpus(), num_codebooks=2)
    batch = data.collate([data[0], data[2]])
    assert batch["codes"].shape == (2, 2, 2) and batch["lengths"].tolist() == [1, 2]
    assert batch["codes"][0, :, 1].tolist() == [-1, -1] and batch["id"] == ["reader/a", "../up"]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader(make_corpus, context: str) -> None:
    folder = make_corpus()
    data = fastmimi.CodesDataset(folder, columns=[])
    data[0]  # so that there is a cache to leave behind
    loader = DataLoader(
        data, batch_size=3, num_workers=2, collate_fn=data.collate, multiprocessing_context=context,
        generator=torch.Generator().manual_seed(0), shuffle=True,
    )  # fmt: skip
    found = {
        id: codes[:, :length].tolist()
        for batch in loader
        for id, codes, length in zip(batch["id"], batch["codes"], batch["lengths"], strict=True)
    }
    assert found == {row["id"]: row["codes"] for row in expected(folder)}
