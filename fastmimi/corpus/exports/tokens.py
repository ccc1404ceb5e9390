"""A folder of token files (`fastmimi.io.tokens`), one for each row, which `fastmimi decode` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...io.tokens import Tokens
from ..codes import CodesTable, samples_of
from ..names import file_name


def write(table: CodesTable, count: int, target: Path, on_progress: Callable[[float], None]) -> None:
    """`<id>.safetensors`, packed; other columns are not kept."""
    settings = table.settings
    for group in table.groups:
        for row in table.records(group, ["duration"], count):
            tokens = Tokens(
                row["codes"], codebook_size=settings.codebook_size, sample_rate=settings.sample_rate,
                frame_rate=settings.frame_rate, frame_size=settings.frame_size, length=samples_of(row, settings),
                fingerprint=settings.fingerprint, model=settings.model, packed=True,
            )  # fmt: skip
            path = target / f"{file_name(row['id'])}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens.save(path)
            on_progress(row["duration"])
