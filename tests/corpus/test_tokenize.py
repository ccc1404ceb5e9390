"""`fastmimi.tokenize`: codes equal `encode` of each file, runs go on, other runs are refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import fastmimi
from fastmimi import InputError, Mimi
from fastmimi.corpus import local, manifest, plan, reading, shards, sources
from fastmimi.corpus.rows import Row
from fastmimi.corpus.verify import verify
from fastmimi.devtools.testing import small_model

QUIET = {"progress": False, "rows_per_shard": 5}


def whole(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in shards.shard_files(out)])


def contents(out: Path) -> dict[str, list[dict[str, object]]]:
    """Every table of a run."""
    return {str(p.relative_to(out)): pq.read_table(p).to_pylist() for p in sorted(out.rglob("*.parquet"))}


def test_codes_are_those_of_each_file_alone(speech: Path, tmp_path: Path, codec: Mimi) -> None:
    out = tmp_path / "codes"
    done = fastmimi.tokenize(speech, out, model=codec, **QUIET)
    table = whole(out)
    assert [path.name for path in shards.shard_files(out)] == [f"shard-{i:05}.parquet" for i in range(3)]
    names = sorted(str(path.relative_to(speech)) for path in speech.rglob("*.*"))
    assert table["id"].to_pylist() == [name for name in names if "/" in name]
    for row, codes in zip(table.to_pylist(), shards.unpack_codes(table["codes"]), strict=True):
        audio = reading.samples(Row(row["id"], row["source"]), codec.sample_rate)
        assert codes.tolist() == codec.encode(torch.from_numpy(audio.T.copy())[None])[0].tolist()
        assert row["duration"] == len(audio) / codec.sample_rate
        assert (row["num_codebooks"], row["n_frames"], row["sample_rate"]) == (*codes.shape, 24_000)
    errors = {row["id"]: row["error"] for row in pq.read_table(out / "errors.parquet").to_pylist()}
    assert errors.keys() == {"broken.wav", "empty.flac"}
    assert errors["empty.flac"] == f"{speech / 'empty.flac'} is empty"
    assert "broken.wav is not an audio file that libsndfile can read" in errors["broken.wav"]
    assert (done.rows, done.errors, done.shards, done.finished) == (12, 2, 3, 3)
    assert done.seconds == pytest.approx(sum(table["duration"].to_pylist()))
    found = verify(out, codec, sample=4)
    assert (found.rows, found.errors, found.checked, found.missing, found.wrong) == (12, 2, 4, 0, [])


@pytest.mark.parametrize("options", [{"memory_mb": 1, "readers": 3}, {"shard": "0/1"}, {"readers": 1}])
def test_limits_change_nothing(speech: Path, tmp_path: Path, codec: Mimi, options: dict[str, object]) -> None:
    fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    fastmimi.tokenize(speech, tmp_path / "b", model=codec, **QUIET, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_run_in_tiles(
    speech: Path, tmp_path: Path, codec: Mimi, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    monkeypatch.setattr(local, "BATCH_SECONDS", 0.4)
    (speech / "0" / "000.wav").write_bytes((speech / "0" / "000.wav").read_bytes()[:-200])  # breaks while it is read
    torch.set_num_threads(threads)
    try:
        fastmimi.tokenize(speech, tmp_path / "b", model=codec, **QUIET)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    a, b = whole(tmp_path / "a").to_pylist(), whole(tmp_path / "b").to_pylist()
    assert [row for row in a if row["id"] != "0/000.wav"] == b
    assert "truncated" in pq.read_table(tmp_path / "b" / "errors.parquet")["error"].to_pylist()[0]


def test_an_array_of_jobs(speech: Path, tmp_path: Path, codec: Mimi) -> None:
    fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    for part, finished in (("1/2", 1), ("0/2", 2)):
        assert not (tmp_path / "b" / "errors.parquet").exists()
        done = fastmimi.tokenize(speech, tmp_path / "b", model=codec, shard=part, **QUIET)
        assert (done.shards, done.finished) == (finished, finished)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_run_goes_on(speech: Path, tmp_path: Path, codec: Mimi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where files have vanished or appeared since, and from another folder."""
    out = tmp_path / "codes"
    fastmimi.tokenize(speech, out, model=codec, **QUIET)
    before = contents(out)
    (out / "shard-00001.parquet").unlink()
    (out / "errors.parquet").unlink()
    (out / ".shard.part").touch()
    monkeypatch.chdir(tmp_path)
    done = fastmimi.tokenize("speech", "codes", model=codec, **QUIET)
    assert contents(out) == before
    assert not (out / ".shard.part").exists()
    assert (done.rows, done.shards, done.finished) == (len(before["shard-00001.parquet"]), 3, 3)
    (out / "shard-00000.parquet").unlink()
    first = before["shard-00000.parquet"][0]
    os.unlink(first["source"])
    soundfile.write(speech / "more.wav", np.zeros(100), 8_000)
    fastmimi.tokenize(speech, out, model=codec, **QUIET)
    after = contents(out)
    assert after["shard-00000.parquet"] == before["shard-00000.parquet"][1:]
    assert f"{first['source']} does not exist" in [row["error"] for row in after["errors.parquet"]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": small_model(seed=1)}, "fingerprint is .* there, .* here"),
        ({"model": small_model(num_quantizers=5)}, "num_codebooks is 6 there, 5 here|fingerprint is"),
        ({"rows_per_shard": 6}, "rows_per_shard is 5 there, 6 here"),
        ({"model": small_model().to(torch.bfloat16)}, "encoder is .*|dtype is float32 there, bfloat16 here"),
        ({"source": "other"}, "is of a run over .*speech, got .*other"),
        ({"source": "other.jsonl"}, r"other\.jsonl is not the manifest that the run in .* began with"),
    ],
)
def test_another_run_is_refused(
    speech: Path, tmp_path: Path, codec: Mimi, options: dict[str, object], message: str,
    files: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "other", 2)
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "a", "uri": "a.wav"}))
    out = tmp_path / "codes"
    fastmimi.tokenize(speech, out, model=codec, **QUIET)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(InputError, match=message):
        fastmimi.tokenize(**{"source": speech, "out": out, "model": codec, **QUIET, **options})
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard": "2/2"}, "shard must be i/n"),
        ({"rows_per_shard": 0}, "rows_per_shard must be a positive integer, got 0"),
        ({"readers": 0}, "readers must be a positive integer, got 0"),
        ({"memory_mb": 1.5}, "memory_mb must be a positive integer, got 1.5"),
        ({"num_codebooks": 3}, "the codec encodes 6 codebooks, got num_codebooks=3"),
        ({"source": "absent"}, "absent does not exist"),
        ({"out": "speech"}, "speech is not empty, and has no settings.json"),
        ({"out": "speech/empty.flac"}, "is not a folder"),
        ({"out": 3}, "out must be a path, got 3"),
    ],
)
def test_arguments_are_checked_before_any_work(
    speech: Path, tmp_path: Path, codec: Mimi, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        fastmimi.tokenize(**{"source": speech, "out": "codes", "model": codec, **QUIET, **options})
    assert not (tmp_path / "codes").exists()


def test_a_run_over_a_manifest_goes_on(
    tmp_path: Path, codec: Mimi, files: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the manifest has moved, or vanished; not if it has changed."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "speech", 3)
    listed, moved, out = tmp_path / "m.jsonl", tmp_path / "n.jsonl", tmp_path / "out"
    manifest.write(sources.table_of("speech"), listed)
    fastmimi.tokenize("m.jsonl", out, model=codec, **QUIET)
    listed.rename(moved)
    for source in (listed, moved):
        assert fastmimi.tokenize(source, out, model=codec, **QUIET).finished == 1
    listed.write_text(moved.read_text().replace('"id": "0', '"id": "other0'))
    with pytest.raises(InputError, match=r"m\.jsonl is not the manifest that the run"):
        fastmimi.tokenize("m.jsonl", out, model=codec, **QUIET)
    pq.write_table(pq.read_table(out / "manifest.parquet").slice(1), out / "manifest.parquet")
    with pytest.raises(InputError, match=r"out/manifest\.parquet is not the manifest that the run"):
        fastmimi.tokenize(moved, out, model=codec, **QUIET)


def test_what_a_manifest_carries(speech: Path, tmp_path: Path, codec: Mimi) -> None:
    file = str(speech / "1" / "001.wav")
    soundfile.write(file, np.random.default_rng(0).uniform(-0.3, 0.3, (48_000, 2)), 24_000)
    rows = [
        {"id": "x", "uri": file, "text": "hello", "speaker": 3},
        {"id": "cut", "uri": file, "start": 0.5, "end": 1.0, "channel": 1, "text": None, "speaker": 4},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fastmimi.tokenize(tmp_path / "m.jsonl", tmp_path / "out", model=codec, progress=False)
    x, cut = whole(tmp_path / "out").to_pylist()
    assert (x["text"], x["speaker"], x["duration"], x["n_frames"]) == ("hello", 3, 2.0, 25)
    assert (cut["start"], cut["end"], cut["channel"], cut["speaker"], cut["n_frames"]) == (0.5, 1.0, 1, 4, 7)
    assert [field.name for field in shards.carried_of(whole(tmp_path / "out").schema)] == ["text", "speaker"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_finished_shards(
    speech: Path, tmp_path: Path, codec: Mimi, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    write, out = shards.write_shard, tmp_path / "b"

    def interrupted(folder: Path, shard: int, *rest: object) -> None:
        if shard == 1:
            raise error
        write(folder, shard, *rest)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(error):
        fastmimi.tokenize(speech, out, model=codec, **QUIET)
    assert [path.name for path in shards.shard_files(out)] == ["shard-00000.parquet"]
    assert not [*out.rglob("*.part")]
    monkeypatch.setattr(shards, "write_shard", write)
    fastmimi.tokenize(speech, out, model=codec, **QUIET)
    assert contents(tmp_path / "a") == contents(out)


def test_a_full_disk_is_one_sentence(
    speech: Path, tmp_path: Path, codec: Mimi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    fastmimi.tokenize(speech, tmp_path / "a", model=codec, shard="0/2", **QUIET)
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(InputError, match=r"00001\.parquet cannot be written \(.*No space left on device"):
        fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    assert not [*(tmp_path / "a").rglob("*.part")]
    monkeypatch.undo()
    fastmimi.tokenize(speech, tmp_path / "a", model=codec, **QUIET)
    assert whole(tmp_path / "a").num_rows == 12


def test_planning_a_large_manifest_is_linear() -> None:
    """Every row of a million is in one batch, without a look at the others' shards."""
    lengths = plan.lengths(np.random.default_rng(0).uniform(1, 20, 200_000), 24_000)
    seen = np.zeros(len(lengths), np.int8)
    for start in range(0, len(lengths), 1000):
        for batch in plan.batches(lengths, range(start, start + 1000), 60 * 24_000):
            assert all(start <= row < start + 1000 for row in batch.rows)
            seen[list(batch.rows)] += 1
    assert (seen == 1).all()
