"""A WebDataset: a tar for each shard, with the codes of a row as `<key>.npy` and its other columns as `<key>.json`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np

from ..codes import CodesTable
from ..names import add_member, file_name


def write(table: CodesTable, count: int, target: Path, on_progress: Callable[[float], None]) -> None:
    """Codes are int16 [K, T]. A key is the id, with other characters than letters, digits, "_", "-" and "/" encoded."""
    for file, groups in groupby(table.groups, key=lambda group: group.file):
        with tarfile.open(target / f"{file.stem}.tar", "w") as tar:
            for row in (row for group in groups for row in table.records(group, None, count)):
                key, array = file_name(row["id"]), io.BytesIO()
                np.save(array, row.pop("codes"))
                add_member(tar, f"{key}.npy", array.getvalue())
                others = json.dumps({**row, "num_codebooks": count}, ensure_ascii=False, default=str)
                add_member(tar, f"{key}.json", others.encode())
                on_progress(row["duration"])
