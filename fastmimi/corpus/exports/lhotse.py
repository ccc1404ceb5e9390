"""Lhotse Shar: `cuts.000000.jsonl.gz` with the field `target_codes.000000.tar`, and so on.

NeMo's Magpie-TTS reads `cut.target_codes.load()` as [K, T] (nemo/collections/tts/data), and its
scripts/magpietts/extend_lhotse_shards_with_audio_codes.py writes the field as here: a TemporalArray along the last
dimension. NeMo's older speech language models read the same field as [T, K].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..codes import CodesTable, Record
from ..names import file_name

if TYPE_CHECKING:
    from lhotse import MonoCut

ROWS = 1000  # of a shard


def write(table: CodesTable, count: int, target: Path, on_progress: Callable[[float], None]) -> None:
    """A cut for each row, without a recording: its id as a file name, one supervision, other columns in `custom`."""
    from lhotse.array import Array, TemporalArray
    from lhotse.shar.writers.array import ArrayTarWriter
    from lhotse.shar.writers.cut import JsonlShardWriter

    # not SharWriter, which cuts an array to the duration of its cut and drops an incomplete last frame
    with (
        JsonlShardWriter(f"{target}/cuts.%06d.jsonl.gz", shard_size=ROWS) as cuts,
        ArrayTarWriter(f"{target}/target_codes.%06d.tar", shard_size=ROWS, compression="numpy") as arrays,
    ):
        for group in table.groups:
            for row in table.records(group, None, count):
                codes = row.pop("codes")
                array = Array(storage_type="shar", storage_path="", storage_key="", shape=list(codes.shape))
                cut = _cut(row)
                cuts.write(cut)
                frame = 1 / table.settings.frame_rate
                arrays.write(cut.id, codes, TemporalArray(array, temporal_dim=-1, frame_shift=frame, start=0.0))
                on_progress(row["duration"])


def _cut(row: Record) -> MonoCut:
    from lhotse import MonoCut, SupervisionSegment

    others: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
    id, duration = file_name(others["id"]), others.pop("duration")
    speaker = others.pop("speaker", others.pop("speaker_id", None))
    supervision = SupervisionSegment(
        id=id, recording_id=id, start=0.0, duration=duration, text=others.pop("text", None),
        language=others.pop("language", None), speaker=None if speaker is None else str(speaker),
    )  # fmt: skip
    # a cut has fields of these names, which mean something else
    custom = {f"source_{key}" if key in ("id", "start", "end", "channel") else key: others[key] for key in others}
    return MonoCut(id=id, start=0.0, duration=duration, channel=0, supervisions=[supervision], custom=custom)
