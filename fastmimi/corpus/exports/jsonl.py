"""JSON lines with `audio_codes`, as the fine-tuning scripts of Qwen3-TTS read them.

Their finetuning/prepare_data.py writes `audio_codes` as a list of frames, each a list of the codes of its codebooks
([T][K]), and finetuning/dataset.py reads it so, with `audio`, `text` and `ref_audio` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..codes import CodesTable


def write(table: CodesTable, count: int, target: Path, on_progress: Callable[[float], None]) -> None:
    """One line for each row: `audio` (the source), `audio_codes` [T][K], and the other columns."""
    with target.open("w", encoding="utf-8") as file:
        for group in table.groups:
            for row in table.records(group, None, count):
                codes, source = row.pop("codes"), row.pop("source")
                line = {"audio": source, **row, "num_codebooks": count, "audio_codes": codes.T.tolist()}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                on_progress(row["duration"])
