"""A small tokenised corpus, with random codes of a small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmimi.corpus.shards import ERROR_COLUMNS, Settings, errors_path, schema, shard_path, table_of
from fastmimi.devtools.testing import small_model

# id, samples at 24 kHz, text; among them less than a frame, whole frames, and ids that are no file names
UTTERANCES = [
    ("reader/a", 1, "one sample"),
    ("reader/b.wav", 1920, "one frame"),
    ("../up", 1921, None),
    ("/etc/passwd", 20_000, "an absolute path"),
    ("ünï ?", 3840, 'quotes " and\nlines'),
    ("..", 5_000, ""),
    ("a\\b", 2_000, "x"),
    ("x" * 300, 9_000, "long"),
]
MakeCorpus = Callable[..., Path]


@pytest.fixture(scope="session")
def codec() -> Any:
    return small_model()  # 6 codebooks of 64 entries


@pytest.fixture
def make_corpus(tmp_path: Path, codec: Any) -> MakeCorpus:
    """A function that writes shards of three rows, each in row groups of two, and returns their folder."""

    def make(name: str = "corpus", utterances: Sequence[tuple[Any, ...]] = UTTERANCES, **changes: Any) -> Path:
        settings = replace(Settings.of(codec, "small"), **changes)
        folder = tmp_path / name
        (folder / "errors").mkdir(parents=True)
        for number, first in enumerate(range(0, len(utterances), 3)):
            table = shard(utterances[first : first + 3], first, settings)
            pq.write_table(table, shard_path(folder, number), row_group_size=2)
        errors = pa.Table.from_pylist([{"id": "bad", "uri": "a.wav", "error": "a.wav is empty"}], ERROR_COLUMNS)
        pq.write_table(errors, errors_path(folder, 0))
        return folder

    return make


def shard(utterances: Sequence[tuple[Any, ...]], first: int, settings: Settings) -> pa.Table:
    draw = np.random.default_rng(first)
    codes = [
        draw.integers(settings.codebook_size, size=(settings.num_codebooks, -(-samples // settings.frame_size)))
        for _, samples, _ in utterances
    ]
    rows = [
        {
            "id": id, "duration": samples / settings.sample_rate, "sample_rate": settings.sample_rate,
            "source": f"audio/{number}.wav", "start": 0.5 if number % 3 else None, "end": 1.5 if number % 3 else None,
            "channel": 1 if number % 3 else None, "text": text, "speaker": f"s{number}",
        }
        for number, (id, samples, text) in enumerate(utterances, first)
    ]  # fmt: skip
    carried = [pa.field("text", pa.string()), pa.field("speaker", pa.string())]
    return table_of(rows, codes, schema(settings, carried))
