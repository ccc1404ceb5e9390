"""Exports, each read back by the library that it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmimi
from fastmimi.corpus.codes import CodesTable
from fastmimi.corpus.export import FORMATS, export
from fastmimi.corpus.names import file_name
from fastmimi.devtools.testing import small_model
from fastmimi.io.tokens import Tokens

pq = pytest.importorskip("pyarrow.parquet", reason="corpora need pyarrow")


def records_of(folder: Path, codebooks: int) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in fastmimi.read_codes(folder, num_codebooks=codebooks)}


@pytest.mark.parametrize("codebooks", [2, 6])
def test_hugging_face_datasets(make_corpus, tmp_path: Path, monkeypatch, codebooks: int) -> None:
    datasets = pytest.importorskip("datasets")
    folder, target = make_corpus(), tmp_path / "hub"
    export(folder, target, "huggingface", num_codebooks=codebooks)
    data = datasets.load_dataset(str(target), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.column_names[:6] == ["id", "text", "speaker_id", "codes", "n_frames", "k_codebooks"]
    assert str(data.features.arrow_schema.field("codes").type).count("int16") == 1
    rows = records_of(folder, codebooks)
    assert data["id"][:] == list(rows)
    for found in data:
        row = rows[found["id"]]
        np.testing.assert_array_equal(found["codes"], row["codes"])
        assert (found["n_frames"], found["k_codebooks"]) == row["codes"].shape[::-1]
        assert (found["text"], found["speaker_id"]) == (row["text"], row["speaker"])
        assert (found["duration"], found["source"]) == (row["duration"], row["source"])
    shards = sorted((target / "data").iterdir())
    assert [path.name for path in shards] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert CodesTable(shards).settings.num_codebooks == codebooks  # and `fastmimi detokenize` can decode them
    card = (target / "README.md").read_text()
    assert f"{codebooks} codebooks" in card and CodesTable(folder).settings.fingerprint in card


def test_hugging_face_columns_without_text_and_speaker(make_corpus, tmp_path: Path) -> None:
    folder = make_corpus()
    for path in folder.glob("shard-*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["text", "speaker"]), path)
    export(folder, tmp_path / "hub", "huggingface")
    table = pq.read_table(tmp_path / "hub" / "data" / "train-00000-of-00003.parquet")
    assert table["text"].to_pylist() == table["speaker_id"].to_pylist() == [None] * 3


def test_jsonl_has_frames_of_codebooks(make_corpus, tmp_path: Path) -> None:
    folder, target = make_corpus(), tmp_path / "train.jsonl"
    export(folder, target, "jsonl", num_codebooks=2)
    lines, rows = (
        [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]],
        records_of(folder, 2),
    )
    assert [line["id"] for line in lines] == list(rows)
    for line in lines:
        row = rows[line["id"]]
        assert line["audio_codes"] == row["codes"].T.tolist() and line["num_codebooks"] == 2
        assert (line["audio"], line["text"], line["speaker"]) == (row["source"], row["text"], row["speaker"])


def test_lhotse_shar(make_corpus, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    folder, target = make_corpus(), tmp_path / "shar"
    export(folder, target, "lhotse")
    assert sorted(path.name for path in target.iterdir()) == ["cuts.000000.jsonl.gz", "target_codes.000000.tar"]
    cuts, rows = list(lhotse.CutSet.from_shar(in_dir=target)), records_of(folder, 6)
    assert [cut.id for cut in cuts] == [file_name(id) for id in rows]
    for cut, (id, row) in zip(cuts, rows.items(), strict=True):
        codes = cut.target_codes.load()
        assert codes.dtype == np.int16
        np.testing.assert_array_equal(codes, row["codes"])
        assert cut.target_codes.frame_shift == 0.08 and cut.duration == row["duration"]
        assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == (row["text"], row["speaker"])
        assert cut.custom["source_id"] == id and cut.custom["source"] == row["source"]
        assert cut.custom.get("source_start") == row["start"]


def test_several_shards_of_lhotse(make_corpus, tmp_path: Path, monkeypatch) -> None:
    lhotse = pytest.importorskip("lhotse")
    monkeypatch.setattr("fastmimi.corpus.exports.lhotse.ROWS", 4)  # 8 rows: the last shard is full
    folder = make_corpus()
    export(folder, tmp_path / "shar", "lhotse", num_codebooks=1)
    assert len(list((tmp_path / "shar").iterdir())) == 4
    cuts, rows = list(lhotse.CutSet.from_shar(in_dir=tmp_path / "shar")), records_of(folder, 1)
    for cut, row in zip(cuts, rows.values(), strict=True):
        np.testing.assert_array_equal(cut.target_codes.load(), row["codes"])


def test_webdataset(make_corpus, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder, target = make_corpus(), tmp_path / "tars"
    export(folder, target, "webdataset", num_codebooks=3)
    shards = [str(path) for path in sorted(target.glob("*.tar"))]
    assert len(shards) == 3
    samples, rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode()), records_of(folder, 3)
    assert [sample["json"]["id"] for sample in samples] == list(rows)
    for sample in samples:
        row = rows[sample["json"]["id"]]
        assert sample["npy"].dtype == np.int16 and sample["json"]["num_codebooks"] == 3
        np.testing.assert_array_equal(sample["npy"], row["codes"])
        assert sample["__key__"] == file_name(row["id"]) and sample["json"]["text"] == row["text"]


def test_token_files(make_corpus, codec, tmp_path: Path) -> None:
    folder, target = make_corpus(), tmp_path / "tokens"
    export(folder, target, "tokens", num_codebooks=2)
    rows = records_of(folder, 2)
    assert len(list(target.rglob("*.safetensors"))) == len(rows)
    for id, row in rows.items():
        tokens = Tokens.load(target / f"{file_name(id)}.safetensors")
        np.testing.assert_array_equal(tokens.codes, row["codes"])
        assert tokens.length == round(row["duration"] * 24_000) and tokens.packed
        assert tokens.fingerprint == fastmimi.checkpoints.weights.fingerprint(codec)


@pytest.mark.parametrize("format", FORMATS)
def test_progress_is_all_of_the_audio(make_corpus, tmp_path: Path, format: str) -> None:
    if FORMATS[format].needs is not None:
        pytest.importorskip(FORMATS[format].needs)
    folder, seconds = make_corpus(), []
    table = export(folder, tmp_path / "out", format, on_progress=seconds.append)
    assert len(table) == 8 and sum(seconds) == pytest.approx(
        sum(row["duration"] for row in records_of(folder, 1).values())
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_leaves_nothing_behind(make_corpus, tmp_path: Path, monkeypatch, format: str) -> None:
    if FORMATS[format].needs is not None:
        pytest.importorskip(FORMATS[format].needs)
    folder, table = make_corpus(), CodesTable.table

    def failing(self, group, columns):
        if group.file.stem == "shard-00002":
            raise OSError(28, "No space left on device")
        return table(self, group, columns)

    monkeypatch.setattr(CodesTable, "table", failing)
    with pytest.raises(OSError, match="No space left"):
        export(folder, tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_what_cannot_be_written_is_refused_before_any_work(make_corpus, tmp_path: Path, monkeypatch) -> None:
    folder = make_corpus()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for target, format, part in (
        (tmp_path / "full", "tokens", "full: it exists, and is not an empty folder"),
        (tmp_path / "none" / "out", "tokens", "there is no directory"),
        (tmp_path / "none" / "out", "jsonl", "there is no directory"),
        (tmp_path / "full", "jsonl", "it is a directory"),
        (folder / "shard-00000.parquet", "jsonl", "is the same file"),
        (tmp_path / "out", "npz", "the format must be one of huggingface, jsonl, .*, got 'npz'"),
    ):
        with pytest.raises(fastmimi.InputError, match=part):
            export(folder, target, format)
    monkeypatch.setattr("fastmimi.corpus.export.find_spec", lambda name: None)
    with pytest.raises(fastmimi.InputError, match="exports to lhotse need lhotse: pip install lhotse"):
        export(folder, tmp_path / "out", "lhotse")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(make_corpus, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(make_corpus(), tmp_path / "out", "webdataset")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_export_for_the_hub_can_be_decoded(make_corpus, codec, tmp_path: Path) -> None:
    folder = make_corpus()
    export(folder, tmp_path / "hub", "huggingface")
    shards = sorted((tmp_path / "hub" / "data").iterdir())
    assert fastmimi.detokenize(shards, tmp_path / "audio", codec).files == 8
    with pytest.raises(fastmimi.InputError, match="other weights"):
        fastmimi.detokenize(shards, tmp_path / "audio", small_model(seed=1))
