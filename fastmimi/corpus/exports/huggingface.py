"""A folder for `datasets.load_dataset` and for the hub, with the columns of the data sets named `*-mimi-codes` there.

They are id, text, speaker_id, codes (int16 [K][T]), n_frames and k_codebooks; the other columns follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..codes import CodesTable
from ..shards import schema

FIRST = ("id", "text", "speaker_id", "codes", "n_frames", "k_codebooks")
CARD = """---
tags: [audio-codec, mimi, speech]
---
Speech as codes of the audio codec `{model}` (fingerprint of its quantizer: {fingerprint}): {count} codebooks of
{codebook_size} entries, {frame_rate:g} frames a second, for audio at {sample_rate} Hz. `codes` is
[k_codebooks][n_frames]. Written by fastmimi; `fastmimi detokenize data/*.parquet` decodes it.
"""


def write(table: CodesTable, count: int, target: Path, on_progress: Callable[[float], None]) -> None:
    """`data/train-00000-of-00001.parquet` and so on, one for each shard, and a data set card."""
    settings = table.settings
    (target / "data").mkdir()
    metadata = schema(replace(settings, num_codebooks=count)).metadata  # for `fastmimi detokenize`
    for number, (_, groups) in enumerate(groupby(table.groups, key=lambda group: group.file)):
        path = target / "data" / f"train-{number:05d}-of-{len(table.files):05d}.parquet"
        writer = None
        for group in groups:
            rows = renamed(table.table(group, table.columns), count).replace_schema_metadata(metadata)
            if writer is None:
                writer = pq.ParquetWriter(path, rows.schema)
            writer.write_table(rows)
            on_progress(float(rows["duration"].to_numpy().sum()))
        if writer is not None:
            writer.close()
    text = CARD.format(
        model=settings.model, fingerprint=settings.fingerprint, count=count, codebook_size=settings.codebook_size,
        frame_rate=settings.frame_rate, sample_rate=settings.sample_rate,
    )  # fmt: skip
    (target / "README.md").write_text(text, encoding="utf-8")


def renamed(rows: pa.Table, count: int) -> pa.Table:
    """Rows of a shard with the first `count` codebooks and the columns of the convention first, null where absent."""
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    columns["codes"] = pc.list_slice(columns["codes"], 0, count)
    del columns["num_codebooks"]
    columns["k_codebooks"] = pa.array([count] * len(rows), pa.int16())
    if "speaker_id" not in columns:
        columns["speaker_id"] = columns.pop("speaker", pa.nulls(len(rows), pa.string()))
    columns.setdefault("text", pa.nulls(len(rows), pa.string()))
    return pa.table({name: columns[name] for name in [*FIRST, *(name for name in columns if name not in FIRST)]})
