"""Sources of audio -> manifests: folders, globs, manifests, tables and data sets that hold audio, archives, cuts.

| kind | source | rows |
|---|---|---|
| `folder` | a folder, or an fsspec URI that ends in / | its audio files, found recursively by their suffixes |
| `glob` | a pattern with * or ?, local or of fsspec | the files that match |
| `manifest` | .parquet, .jsonl or .csv | those of the file |
| `parquet` | a .parquet file or a glob of them, local or of fsspec | rows with a column of audio bytes |
| `dataset` | hf:NAME?split=train&config=clean&column=audio, or a folder of `save_to_disk` | those of the data set |
| `webdataset` | a .tar or a glob of them, local or of fsspec | the samples, with what their .json and .txt say |
| `lhotse` | cuts, .jsonl or .jsonl.gz | the cuts, which must be of one channel of one recording |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa

from ..errors import InputError, named, shown
from ..io.audio import SUFFIXES, files_below
from ..models.validation import json_object
from . import embedded, manifest, shards
from .reading import is_remote
from .rows import Row, Scalar

Source = str | Path


def table_of(
    source: Source, kind: str | None = None, progress: manifest.Progress = lambda done, total: None
) -> pa.Table:
    """The manifest of a source, with the durations that can be found without reading the audio.

    kind: which of the module's table the source is; by default that is seen from the source. Raises InputError for a
    source that is not there or has no audio, and for what `manifest.checked` refuses.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"the source must be a path, a glob or a URI, got {shown(source)}")
    kind = kind_of(source) if kind is None else kind
    if kind not in READERS:
        raise InputError(f"the kind of a source must be one of {', '.join(READERS)}, got {shown(kind)}")
    found = READERS[kind](str(source))
    table = found if isinstance(found, pa.Table) else manifest.of_rows(found)
    return manifest.with_durations(table, progress)


def kind_of(source: Source) -> str:
    """What a source is, from its name and, of a local one, whether it is a folder."""
    name, path = str(source), Path(source)
    if name.startswith("hf:") and not name.startswith("hf://"):
        return "dataset"
    if path.is_dir():
        return "dataset" if (path / "state.json").is_file() else "folder"
    if name.endswith("/"):
        return "folder"
    if name.endswith(".tar"):
        return "webdataset"
    if name.endswith((".jsonl.gz", "cuts.jsonl")):
        return "lhotse"
    if name.endswith(".parquet") and (_is_glob(name) or is_remote(name) or not _has_uris(path)):
        return "parquet"
    if path.suffix in manifest.SUFFIXES:
        return "manifest"
    if _is_glob(name):
        return "glob"
    if not (path.exists() or is_remote(name)):
        raise InputError(f"{name} does not exist")
    raise InputError(f"{name} is no folder, glob, manifest (.parquet, .jsonl, .csv), .tar or cuts (.jsonl.gz)")


def absolute(source: Source) -> str:
    """The source's name, which means the same in any working directory."""
    name = str(source)
    return name if "://" in name or name.startswith("hf:") else str(Path.cwd() / name)


# Folders and globs


def _folder(name: str) -> Iterable[Row]:
    if is_remote(name):
        yield from _of_files([uri for uri in _matching(name.rstrip("/") + "/**") if _is_audio(uri)], name.rstrip("/"))
        return
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    files = [str(path) for path in files_below(folder.absolute())]
    if not files:
        raise InputError(f"{folder} holds no audio files")
    yield from _of_files(files, str(folder.absolute()))


def _glob(name: str) -> Iterable[Row]:
    found = [uri for uri in _matching(name) if _is_audio(uri)]
    if not found:
        raise InputError(f"no audio file matches {name}")
    fixed = re.split(r"[*?\[]", absolute(name))[0].rpartition("/")[0]  # the folder that all of them are in
    return _of_files(found, fixed)


def _of_files(uris: list[str], base: str) -> Iterator[Row]:
    """Rows whose ids are the paths below a folder."""
    return (Row(uri.removeprefix(base).lstrip("/"), uri) for uri in uris)


def _matching(pattern: str) -> list[str]:
    """The files that a pattern of fsspec matches, as absolute paths or URIs, in order."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(absolute(pattern))
    found = sorted(path for path, about in filesystem.glob(path, detail=True).items() if about["type"] == "file")
    return [str(path) if not is_remote(pattern) else filesystem.unstrip_protocol(path) for path in found]


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _is_audio(uri: str) -> bool:
    return PurePosixPath(uri).suffix.lower() in SUFFIXES


# Tables with audio


def _has_uris(path: Path) -> bool:
    import pyarrow.parquet as pq

    try:
        return "uri" in pq.read_schema(path).names
    except shards.DAMAGED:
        return True  # `manifest.read` says what is wrong


def _parquet(name: str) -> pa.Table:
    """Of Parquet files with a column "audio"; what else they have of scalars is carried, `duration` is trusted."""
    import fsspec
    import pyarrow.parquet as pq

    tables = []
    for uri in _matching(name):
        with fsspec.open(uri) as stream:
            file = pq.ParquetFile(stream)
            if "audio" not in file.schema_arrow.names:
                raise InputError(f"{uri} has neither a column uri nor a column audio")
            tables.append(_of_columns(file.read(_scalars(file.schema_arrow)), f"row://{{}}/audio::{uri}", uri))
    if not tables:
        raise InputError(f"no file matches {name}")
    return manifest.checked(pa.concat_tables(tables, promote_options="permissive"), name)


def _dataset(name: str) -> pa.Table:
    """Of a data set of `datasets`; "column" names the one with audio, "audio" by default."""
    spec = name.removeprefix("hf:")
    if Path(spec).is_dir():
        spec = str(Path(spec).absolute())
    column = dict(parse_qsl(spec.partition("?")[2])).get("column", "audio")
    found = embedded.dataset(spec, column)
    rows = found.select_columns(_scalars(found.features.arrow_schema)).with_format("arrow")[:]
    if not rows.num_columns:
        rows = pa.table({"row": pa.array(range(len(found)))})
    return manifest.checked(_of_columns(rows, f"dataset://{{}}/{column}::{spec}", spec), name)


def _scalars(columns: pa.Schema) -> list[str]:
    return [column.name for column in columns if manifest.is_scalar(column.type)]


def _of_columns(table: pa.Table, uri: str, where: str) -> pa.Table:
    """The rows of a table with a URI each; their ids are the column "id" or, without one, the number of the row."""
    numbers = range(table.num_rows)
    taken = {"uri": pa.array([uri.format(i) for i in numbers])}
    if "id" not in table.column_names:
        taken["id"] = pa.array([f"{PurePosixPath(where.partition('?')[0]).name}/{i}" for i in numbers])
    return pa.table({**{n: table[n] for n in table.column_names if n not in ("uri",)}, **taken})


# Archives and cuts


def _webdataset(name: str) -> Iterator[Row]:
    uris = _matching(name)
    if not uris:
        raise InputError(f"no file matches {name}")
    for uri in uris:
        yield from _members(uri)


def _members(uri: str) -> Iterator[Row]:
    """The samples of an archive: members whose names are equal up to the first dot of the file's name."""
    import tarfile

    import fsspec

    samples: dict[str, dict[str, Any]] = {}
    try:
        with fsspec.open(uri) as stream, tarfile.open(fileobj=stream) as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not member.isfile() or not extension:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if _is_audio(member.name):
                    sample["audio"] = member.name
                elif extension in ("json", "txt"):
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has contents
                    sample[extension] = content.read().decode("utf-8", "replace")
    except tarfile.TarError as error:
        raise InputError(f"{uri} is not a complete tar file ({error})") from None
    for key, sample in samples.items():
        if "audio" in sample:
            yield Row(
                f"{PurePosixPath(uri).stem}/{key}",
                f"tar://{sample['audio']}::{uri}",
                carried=_told(sample, f"{key} of {uri}"),
            )


def _told(sample: dict[str, Any], where: str) -> dict[str, Scalar]:
    """What the .json and the .txt of a sample say; of the first, values that are scalars."""
    if (values := json_object(sample.get("json", "{}"))) is None:
        raise InputError(f"{where} has a .json that is no JSON object")
    reserved = {*manifest.COLUMNS.names}
    told: dict[str, Scalar] = {
        name: value
        for name, value in values.items()
        if name not in reserved and isinstance(value, str | int | float | bool)
    }
    return {**told, "text": sample["txt"]} if "txt" in sample else told


def _lhotse(name: str) -> Iterator[Row]:
    from lhotse import CutSet, MonoCut

    for cut in CutSet.from_file(name):
        if not isinstance(cut, MonoCut) or not cut.has_recording or len(cut.recording.sources) != 1:
            raise InputError(f"cut {named(cut.id)} must be of one channel of one recording with one source")
        origin = cut.recording.sources[0]
        if origin.type not in ("file", "url"):
            raise InputError(f"cut {named(cut.id)} must have a file or a URL as its source, got {shown(origin.type)}")
        uri = origin.source if "://" in origin.source else str(Path(origin.source).absolute())
        told = (
            {} if not cut.supervisions else {"text": cut.supervisions[0].text, "speaker": cut.supervisions[0].speaker}
        )
        whole = cut.start == 0 and cut.duration == cut.recording.duration
        yield Row(cut.id, uri, None if whole else cut.start, None if whole else cut.end, cut.channel, told)


READERS: dict[str, Callable[[str], Iterable[Row] | pa.Table]] = {
    "folder": _folder, "glob": _glob, "manifest": manifest.read, "parquet": _parquet, "dataset": _dataset,
    "webdataset": _webdataset, "lhotse": _lhotse,
}  # fmt: skip
