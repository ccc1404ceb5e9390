"""Every kind of source becomes a manifest whose rows can be read, also from stores and archives."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from fastmimi.corpus import embedded, manifest, reading, sources
from fastmimi.corpus.rows import Row
from fastmimi.errors import InputError

RATE = 24_000


def sound(seed: int, length: int = 3000) -> np.ndarray:
    """[length] float32, on the grid of 16 bits."""
    return np.random.default_rng(seed).integers(-9000, 9000, length).astype(np.float32) / 32_768


def encoded(seed: int, suffix: str = "flac") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(seed), RATE, format=suffix)
    return file.getvalue()


def rows(source: object, kind: str | None = None) -> list[Row]:
    return manifest.rows_of(sources.table_of(source, kind))  # type: ignore[arg-type]


def check(found: list[Row]) -> None:
    """The i-th row is the sound i."""
    for i, row in enumerate(found):
        assert np.array_equal(reading.samples(row, RATE)[:, 0], sound(i)), row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.flac and b/a.flac, and files that are no audio."""
    for i, name in enumerate(("a.flac", "b/a.flac")):
        path = tmp_path / "speech" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    (tmp_path / "speech" / "notes.txt").write_text("a")
    return tmp_path / "speech"


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(folder)
    assert [row.id for row in found] == ["a.flac", "b/a.flac"]
    assert sources.table_of(folder)["duration"].to_pylist() == [3000 / RATE] * 2
    check(found)
    monkeypatch.chdir(folder.parent)
    assert rows("speech") == found


@pytest.mark.parametrize("pattern", ["{}/**/*.flac", "{}/*.flac", "{}/[ab]*/*.flac"])
def test_globs(folder: Path, pattern: str) -> None:
    found = rows(pattern.format(folder))
    names = {str(path) for path in Path(folder).glob(pattern.removeprefix("{}/"))}
    assert {row.uri for row in found} == names
    assert len({row.id for row in found}) == len(found) > 0


def test_a_store(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/speech", recursive=True)
    try:
        for name in ("memory://speech/", "memory://speech/**/*.flac"):
            found = rows(name)
            assert [row.uri for row in found] == ["memory:///speech/a.flac", "memory:///speech/b/a.flac"]
            assert len({row.id for row in found}) == 2
            check(found)
            assert sources.table_of(name)["duration"].to_pylist() == [3000 / RATE] * 2
        with pytest.raises(InputError, match=r"memory:///speech/c\.flac cannot be read"):
            reading.samples(Row("c", "memory:///speech/c.flac"), RATE)
        store.pipe("/speech/d.flac", b"no audio")
        with pytest.raises(InputError, match=r"^memory:///speech/d\.flac is not an audio file"):
            reading.samples(Row("d", "memory:///speech/d.flac"), RATE)
    finally:
        store.rm("/speech", recursive=True)


def test_a_scheme_that_nothing_opens() -> None:
    with pytest.raises(InputError, match=r"nowhere://a\.flac cannot be fetched"):
        reading.samples(Row("a", "nowhere://a.flac"), RATE)


def test_archives(tmp_path: Path) -> None:
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for key in ("x", "y"):
                seed = 2 * shard + (key == "y")
                told = {"speaker": f"p{seed}", "words": ["no", "scalar"], "duration": 99}
                members = {"flac": encoded(seed), "json": json.dumps(told).encode(), "txt": b"hello", "cls": b"3"}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"sub/{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    found = rows(tmp_path / "s-*.tar")
    assert [row.id for row in found] == ["s-0/sub/x", "s-0/sub/y", "s-1/sub/x", "s-1/sub/y"]
    assert found[1].carried == {"speaker": "p1", "text": "hello"}
    assert sources.table_of(tmp_path / "s-0.tar")["duration"].to_pylist() == [3000 / RATE] * 2
    check(found)
    (tmp_path / "t.tar").write_bytes((tmp_path / "s-0.tar").read_bytes()[:700])
    with pytest.raises(InputError, match=r"t\.tar is not a complete tar file"):
        rows(tmp_path / "t.tar")
    with tarfile.open(tmp_path / "list.tar", "w") as archive:
        for name, content in (("x.flac", encoded(0)), ("x.json", b"[1]")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"has a \.json that is no JSON object"):
        rows(tmp_path / "list.tar")


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_files_with_audio(tmp_path: Path, as_struct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded._row_groups, "_most", 1)  # one row group at a time
    content = [{"bytes": encoded(i), "path": None} if as_struct else encoded(i) for i in range(5)]
    table = pa.table({"audio": content, "text": list("abcde"), "tags": [["x"]] * 5})
    pq.write_table(table, tmp_path / "p-0.parquet", row_group_size=2)
    found = rows(tmp_path / "p-0.parquet")
    assert [row.id for row in found] == [f"p-0.parquet/{i}" for i in range(5)]
    assert [row.carried for row in found] == [{"text": letter} for letter in "abcde"]
    check(found)
    assert rows(str(tmp_path / "p-*.parquet")) == found
    pq.write_table(table.drop(["audio"]), tmp_path / "q.parquet")
    with pytest.raises(InputError, match="has neither a column uri nor a column audio"):
        rows(tmp_path / "q.parquet")


@pytest.mark.parametrize("saved", [True, False], ids=["save_to_disk", "load_dataset"])
def test_data_sets(tmp_path: Path, saved: bool) -> None:
    datasets = pytest.importorskip("datasets")
    content = {"audio": [{"bytes": encoded(i), "path": f"{i}.flac"} for i in range(3)], "text": ["x", "y", "z"]}
    if saved:
        data = datasets.Dataset.from_dict(content)
        data.save_to_disk(tmp_path / "d")
        found = rows(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        pq.write_table(pa.table(content), tmp_path / "d" / "train.parquet")
        found = rows(f"hf:{tmp_path / 'd'}?split=train")
    assert [row.id for row in found] == ["d/0", "d/1", "d/2"]
    assert [row.carried for row in found] == [{"text": letter} for letter in "xyz"]
    check(found)
    with pytest.raises(InputError, match="has no column 'sound', only audio, text"):
        rows(f"hf:{tmp_path / 'd'}?split=train&column=sound")


def test_cuts(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([sound(0, RATE), sound(1, RATE)], 1), RATE)
    recording = lhotse.Recording.from_file(path)
    told = lhotse.SupervisionSegment("s", recording.id, 0.25, 0.5, text="hello", speaker="p")
    cuts = [
        lhotse.MonoCut("whole", 0, 1.0, channel=0, recording=recording),
        lhotse.MonoCut("cut", 0.25, 0.5, channel=1, recording=recording, supervisions=[told]),
    ]
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    whole, cut = rows(tmp_path / "cuts.jsonl.gz")
    assert (whole.id, whole.start, whole.end, whole.channel) == ("whole", None, None, 0)
    assert (cut.id, cut.start, cut.end, cut.channel) == ("cut", 0.25, 0.75, 1)
    assert cut.carried == {"text": "hello", "speaker": "p"}
    assert np.array_equal(reading.samples(cut, RATE)[:, 0], sound(1, RATE)[RATE // 4 : RATE * 3 // 4])
    lhotse.CutSet.from_cuts([cuts[0].append(cuts[1])]).to_file(tmp_path / "mixed.jsonl.gz")
    with pytest.raises(InputError, match="must be of one channel of one recording"):
        rows(tmp_path / "mixed.jsonl.gz")


@pytest.mark.parametrize(
    "source, message",
    [
        ("absent", "absent does not exist"),
        ("absent/*.wav", "no audio file matches"),
        ("absent-*.tar", "no file matches"),
        ("empty", "holds no audio files"),
        (3, "must be a path, a glob or a URI, got 3"),
    ],
)
def test_sources_that_are_not_there(
    tmp_path: Path, source: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        rows(source)
    with pytest.raises(InputError, match=r"kind of a source must be one of folder, .* got 'list'"):
        rows("empty", "list")
