"""Codes back to audio: equal to decoding each row alone, resumable, and never outside of the folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies

import fastmimi
from fastmimi.corpus import detokenize as module
from fastmimi.corpus.names import file_name
from fastmimi.devtools.testing import relative_error, small_model

TOLERANCE = 1e-5  # of the peak, as of any two ways to decode the same codes


def alone(codec, record) -> np.ndarray:
    """The audio of a record decoded by itself, cut to its duration: [N]."""
    codes = torch.from_numpy(record["codes"].astype(np.int64))[None]
    return codec.decode(codes)[0, 0, : round(record["duration"] * 24_000)].numpy()


def assert_decoded(path: Path | io.BytesIO, record, codec) -> None:
    audio, rate = soundfile.read(path, dtype="float32")
    expected = alone(codec, record)
    assert rate == 24_000 and audio.shape == expected.shape
    assert relative_error(torch.from_numpy(audio), torch.from_numpy(expected)) < TOLERANCE


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [1, 8, 1500])  # frames: all rows alone as streams, some of them, none
def test_the_audio_is_that_of_each_row_alone(make_corpus, codec, tmp_path, monkeypatch, limit: int) -> None:
    monkeypatch.setattr(module, "BATCH_FRAMES", limit)
    monkeypatch.setattr(module, "WINDOW_FRAMES", 20)
    folder = make_corpus()
    seconds: list[float] = []
    written = fastmimi.detokenize(folder, tmp_path / "audio", codec, suffix="mat5", on_progress=seconds.append)
    records = list(fastmimi.read_codes(folder))
    for record in records:
        assert_decoded(tmp_path / "audio" / f"{file_name(record['id'])}.mat5", record, codec)
    assert written.files == len(records) and written.skipped == 0 and len(seconds) == len(records)
    assert (
        written.seconds == pytest.approx(sum(record["duration"] for record in records)) == pytest.approx(sum(seconds))
    )
    assert len(files_of(tmp_path / "audio")) == len(records) + 1


@pytest.mark.parametrize("kind", ["not_causal", "stereo"])
def test_other_kinds_of_codecs(make_corpus, tmp_path, kind: str) -> None:
    other = small_model(kind)
    folder = make_corpus(fingerprint=fastmimi.checkpoints.weights.fingerprint(other))
    fastmimi.detokenize(folder, tmp_path / "audio", other, suffix="mat5")
    for record in fastmimi.read_codes(folder):
        audio, _ = soundfile.read(tmp_path / "audio" / f"{file_name(record['id'])}.mat5", always_2d=True)
        expected = other.decode(torch.from_numpy(record["codes"].astype(np.int64))[None])[0, :, : len(audio)].T
        assert len(audio) == round(record["duration"] * 24_000)
        assert relative_error(torch.from_numpy(audio), expected) < TOLERANCE


def test_fewer_codebooks_and_a_compressed_format(make_corpus, codec, tmp_path) -> None:
    folder = make_corpus()
    fastmimi.detokenize(folder, tmp_path / "audio", codec, num_codebooks=2)
    for record in fastmimi.read_codes(folder, num_codebooks=2):
        audio, _ = soundfile.read(tmp_path / "audio" / f"{file_name(record['id'])}.flac", dtype="float32")
        np.testing.assert_allclose(audio, alone(codec, record).clip(-1, 1), atol=2**-14)


def test_a_webdataset(make_corpus, codec, tmp_path) -> None:
    folder = make_corpus()
    written = fastmimi.detokenize(folder, tmp_path / "audio", codec, suffix="wav", webdataset=True)
    assert files_of(tmp_path / "audio") == {"shard-00000.tar", "shard-00001.tar", "shard-00002.tar", "detokenize.json"}
    records = {record["id"]: record for record in fastmimi.read_codes(folder)}
    assert written.files == len(records)
    order = []
    for path in sorted((tmp_path / "audio").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in [name for name in members if name.endswith(".json")]:
            row = json.loads(members[name])
            record = records[row["id"]]
            order.append(row["id"])
            assert row == {key: value for key, value in record.items() if key != "codes"}
            audio, _ = soundfile.read(io.BytesIO(members[name.removesuffix("json") + "wav"]), dtype="float32")
            np.testing.assert_allclose(audio, alone(codec, record).clip(-1, 1), atol=2**-14)
    assert order == list(records)
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted((tmp_path / "audio").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == order
    assert all(sample["wav"] for sample in samples)


# Resuming


def test_existing_files_are_skipped(make_corpus, codec, tmp_path) -> None:
    folder, audio = make_corpus(), tmp_path / "audio"
    fastmimi.detokenize(folder, audio, codec)
    names = sorted(files_of(audio) - {"detokenize.json"})
    whole = {name: (audio / name).read_bytes() for name in names}
    (audio / names[0]).unlink()
    (audio / names[3]).unlink()
    times = {name: (audio / name).stat().st_mtime_ns for name in files_of(audio)}
    seconds: list[float] = []
    written = fastmimi.detokenize(folder, audio, codec, on_progress=seconds.append)
    assert (written.files, written.skipped, len(seconds)) == (2, len(names) - 2, len(names))
    assert {name: (audio / name).read_bytes() for name in names} == whole
    assert all((audio / name).stat().st_mtime_ns == time for name, time in times.items())


@pytest.mark.parametrize("webdataset", [False, True])
def test_a_run_that_fails_leaves_whole_files_and_is_finished_by_the_next(
    make_corpus, codec, tmp_path, monkeypatch, webdataset: bool
) -> None:
    folder, audio = make_corpus(), tmp_path / "audio"
    fastmimi.detokenize(folder, tmp_path / "whole", codec, webdataset=webdataset)
    write, calls = module.AudioWriter.write, []

    def failing(self, block):
        calls.append(block)
        if len(calls) == 5:
            raise fastmimi.InputError("is the disk full?")
        write(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(module.AudioWriter, "write", failing)
        with pytest.raises(fastmimi.InputError, match="is the disk full"):
            fastmimi.detokenize(folder, audio, codec, webdataset=webdataset)
    before = files_of(audio)
    assert len(before) == (2 if webdataset else 5) and not [name for name in before if "part" in name]
    fastmimi.detokenize(folder, audio, codec, webdataset=webdataset)
    assert files_of(audio) == files_of(tmp_path / "whole")
    for name in files_of(audio):
        assert (audio / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_run_into_the_same_folder_is_refused(make_corpus, codec, tmp_path) -> None:
    folder, audio = make_corpus(), tmp_path / "audio"
    fastmimi.detokenize(folder, audio, codec)
    before = files_of(audio)
    for options, part in (
        ({"suffix": "wav"}, "suffix 'flac', not 'wav'"),
        ({"num_codebooks": 2}, "num_codebooks 6, not 2"),
        ({"webdataset": True}, "webdataset False, not True"),
    ):
        with pytest.raises(fastmimi.InputError, match=part):
            fastmimi.detokenize(folder, audio, codec, **options)
    for damaged in ("{", "[1]"):
        (audio / "detokenize.json").write_text(damaged)
        with pytest.raises(fastmimi.InputError, match=r"detokenize\.json is damaged"):
            fastmimi.detokenize(folder, audio, codec)
    assert files_of(audio) == before


def test_codes_of_other_weights_are_refused_by_name(make_corpus, codec, tmp_path) -> None:
    folder, other = make_corpus(), small_model(seed=1)
    fastmimi.save_pretrained(other, tmp_path / "other")
    with pytest.raises(fastmimi.InputError) as caught:
        fastmimi.detokenize(folder, tmp_path / "audio", str(tmp_path / "other"))
    for part in (
        "made with small",
        str(tmp_path / "other"),
        fastmimi.checkpoints.weights.fingerprint(codec),
        "--force",
    ):
        assert part in str(caught.value)
    with pytest.raises(fastmimi.InputError, match=r"its suffix must be one of .*, got '\.doc'"):
        fastmimi.detokenize(folder, tmp_path / "audio", codec, suffix="doc")
    assert not (tmp_path / "audio").exists()
    fastmimi.detokenize(folder, tmp_path / "audio", str(tmp_path / "other"), force=True)
    record = next(iter(fastmimi.read_codes(folder)))
    assert soundfile.info(tmp_path / "audio" / f"{file_name(record['id'])}.flac").frames == 1


# Batches and names


@given(strategies.lists(strategies.integers(0, 2_000), max_size=40))
def test_each_row_is_in_one_batch_of_the_budget_or_alone(lengths: list[int]) -> None:
    found = list(module.batches(lengths))
    assert sorted(i for batch in found for i in batch) == [i for i, n in enumerate(lengths) if n <= module.BATCH_FRAMES]
    assert all(batch and len(batch) * max(lengths[i] for i in batch) <= module.BATCH_FRAMES for batch in found)


@given(strategies.lists(strategies.text(strategies.sampled_from("aA./\\%~ \0é-_日\ud800"), max_size=8), unique=True))
def test_names_are_safe_and_unique(ids: list[str]) -> None:
    names = [file_name(id) for id in ids]
    assert len(set(names)) == len(ids)
    for id, name in zip(ids, names, strict=True):
        assert os.path.normpath(f"/x/{name}.flac") == f"/x/{name}.flac"
        assert not any(part.startswith(".") or part == "" for part in name.split("/"))
        assert "." not in name and "\0" not in name and "\\" not in name
        if "//" not in f"/{id}/" and "\ud800" not in id:
            assert unquote(name) == id


def test_long_names_end_in_a_hash() -> None:
    first, second = (file_name(f"reader/{'é' * 300}{end}") for end in "ab")
    assert first != second and all(len(name.encode()) < 200 for name in (first, second))
    assert file_name("é" * 90) == "é" * 90
