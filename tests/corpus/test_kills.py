"""A run that was killed at random moments goes on, and its tables are those of a run that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import fastmimi
from fastmimi.devtools import kill


@pytest.mark.slow
def test_kills(tmp_path: Path, codec: fastmimi.Mimi, model: Path, files: Callable[..., None]) -> None:
    speech, whole, killed = (tmp_path / name for name in ("speech", "whole", "killed"))
    files(speech, 40, 10.0)
    (speech / "0" / "broken.wav").write_bytes(b"RIFF")
    fastmimi.tokenize(speech, whole, model=codec, rows_per_shard=4, progress=False)
    command = ["-m", "fastmimi", "tokenize", str(speech), str(killed), "--model", str(model), "--rows-per-shard", "4"]
    began = (killed / "settings.json").exists
    codes = kill.until_it_ends([*command, "--threads", "1"], kills=3, began=began, most_s=1.0)
    assert codes[-1] == 0
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.suffix == ".parquet")
    left = [str(path.relative_to(killed)) for path in killed.rglob("*") if path.is_file()]
    assert sorted(left) == sorted([*names, "settings.json"])
    for name in names:
        assert pq.read_table(killed / name).equals(pq.read_table(whole / name)), name
