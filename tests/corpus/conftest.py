"""A small codec, audio files, and a small tokenised corpus with random codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

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


RATES = (16_000, 24_000, 44_100, 8_000)
SUFFIXES = ("wav", "flac", "ogg", "mp3")


@pytest.fixture(scope="session")
def codec() -> Any:
    """A codec with 6 codebooks of 64 entries and a window of 24 positions, with random weights."""
    return small_model()


@pytest.fixture(scope="session")
def model(codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same codec."""
    from fastmimi import save_pretrained

    folder = tmp_path_factory.mktemp("model")
    save_pretrained(codec, folder)
    return folder


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A folder of 12 files of several formats, rates and lengths, of which one is broken and one is empty."""
    folder = tmp_path / "speech"
    write_files(folder, 12)
    (folder / "broken.wav").write_bytes(b"RIFF nothing that could be read")
    (folder / "empty.flac").touch()
    return folder


@pytest.fixture
def files() -> Callable[[Path, int], None]:
    return write_files


def write_files(folder: Path, count: int, seconds: float = 1.5) -> None:
    """Audio of up to so many seconds in `count` files, in subfolders."""
    draw = np.random.default_rng(count)
    for i in range(count):
        rate, suffix = RATES[i % 4], SUFFIXES[i // 2 % 4]
        length = max(1, int(draw.uniform(0, seconds) * rate))
        time = np.arange(length) / rate
        tone = 0.3 * np.sin(2 * np.pi * draw.uniform(80, 400) * time) + 0.05 * draw.standard_normal(length)
        path = folder / f"{i % 3}" / f"{i:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.stack([tone, tone[::-1]], 1) if i % 5 == 0 else tone, rate)


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
