"""The commands `train` and `evaluate`: checks before any work, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import typer
from rich.table import Table

from ..errors import InputError
from ..io import plot
from ..io.files import check_output, replacing
from . import report, work

if TYPE_CHECKING:
    from ..models.codec import Codec
    from ..train.evaluate import Evaluation, Result

REQUIRED_PACKAGES = ("accelerate", "omegaconf", "pesq", "pystoi", "scipy", "tensorboard")


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"training and evaluation need {', '.join(missing)}: pip install 'fastmimi[train]'")


def train(config: Path, changes: list[str]) -> None:
    _check_installed()
    from ..train.config import TrainConfig

    read = TrainConfig.read(config, changes)
    from ..train.loop import train

    model = train(read)
    report.show([("model", str(model)), ("log", f"{model.parent / 'log'}: tensorboard --logdir {model.parent}")])


def evaluate(
    folder: Path, model: str, counts: list[int] | None, device: str, json: Path | None, pictures: Path | None
) -> None:
    _check_installed()
    from ..train.evaluate import audio_files
    from ..train.evaluate import evaluate as measure

    files = audio_files(folder)
    if json is not None:
        check_output(json, [file.path for file in files.values()])
    if pictures is not None:
        plot.check(Path("picture.png"))
    codec = work.load(model, device, "float32", "auto")
    counts = counts or sorted({min(8, codec.total_codebooks), codec.total_codebooks})
    for count in counts:
        if not 1 <= count <= codec.total_codebooks:
            raise InputError(f"codebooks must lie in [1, {codec.total_codebooks}] for {model}, got {count}")

    def draw(name: str, codes: np.ndarray, sounds: dict[str, np.ndarray]) -> None:
        if pictures is not None:
            target = pictures / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _draw(target, codec, codes, sounds, f"{name}, {model}")

    with report.busy(f"measuring {len(files)} files"):
        found = measure(codec, model, files, counts, draw)
    if json is not None:
        with replacing(json) as part:
            part.write_text(found.to_json())
    if pictures is not None:
        with replacing(pictures / "codebooks.png") as part:
            plot.draw_usage(part, [level.used for level in found.usage], [level.perplexity for level in found.usage])
    _show(found)


def _draw(target: Path, codec: Codec, codes: np.ndarray, sounds: dict[str, np.ndarray], title: str) -> None:
    with replacing(target) as part:
        plot.draw(
            part, "png", codes, sounds, sample_rate=codec.sample_rate, frame_size=codec.frame_size,
            codebook_size=codec.config.codebook_size, title=title,
        )  # fmt: skip


def _show(found: Evaluation) -> None:
    table = Table(title=found.model, title_justify="left")
    for column in ("file", "codebooks", "SI-SDR dB", "mel", "STOI", "ESTOI", "PESQ"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for result in found.files:
        table.add_row(*_row(result))
    table.add_section()
    for result in found.means:
        table.add_row(*_row(result))
    report.print_table(table)
    levels = ", ".join(f"{level.perplexity:.0f}" for level in found.usage)
    typer.echo(f"perplexity of each codebook: {levels}")


def _row(result: Result) -> list[str]:
    values = (result.si_sdr, result.mel, result.stoi, result.estoi, result.pesq)
    return [result.file, str(result.codebooks), *("-" if value is None else f"{value:.3f}" for value in values)]
