"""Write a table of codes in the format of another library."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, shown
from ..io.files import check_output, new_folder, path_of, replacing
from .codes import CodesTable, Source
from .exports import huggingface, jsonl, lhotse, tokens, webdataset


class Format(NamedTuple):
    write: Callable[[CodesTable, int, Path, Callable[[float], None]], None]
    is_folder: bool = True
    needs: str | None = None  # a package


FORMATS = {
    "huggingface": Format(huggingface.write),
    "jsonl": Format(jsonl.write, is_folder=False),
    "lhotse": Format(lhotse.write, needs="lhotse"),
    "tokens": Format(tokens.write),
    "webdataset": Format(webdataset.write),
}


def export(
    source: Source, target: str | Path, format: str, *, num_codebooks: int | None = None,
    on_progress: Callable[[float], None] = lambda seconds: None,
) -> CodesTable:  # fmt: skip
    """Write a table of codes in another format; docs/corpus-formats.md says what each holds and who reads it.

    Args:
        source: the output folder of `fastmimi tokenize`, one shard, or several shards.
        target: a file for jsonl, a new or empty folder for the other formats.
        format: one of `FORMATS`.
        num_codebooks: write only the first codebooks; by default all.
        on_progress: called with the seconds of audio that were written since the last call.

    Returns the table that was written. The result appears whole or not at all: it is written under a temporary name.
    Raises InputError, before anything is written, for an invalid source or argument, or a package that is missing.
    """
    if format not in FORMATS:
        raise InputError(f"the format must be one of {', '.join(FORMATS)}, got {shown(format)}")
    write, is_folder, needs = FORMATS[format]
    if needs is not None and find_spec(needs) is None:
        raise InputError(f"exports to {format} need {needs}: pip install {needs}")
    table = CodesTable(source)
    count, path = table.codebooks(num_codebooks), path_of(target, "target")
    if not is_folder:
        check_output(path, table.files)
    with (new_folder if is_folder else replacing)(path) as part:
        write(table, count, part, on_progress)
    return table
