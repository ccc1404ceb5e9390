"""The commands for what a tokenised corpus becomes: `detokenize`, `corpus stats` and `corpus export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..io.audio import output_format
from ..io.files import replacing
from . import report, work
from .corpus import check_installed

if TYPE_CHECKING:
    from ..corpus.codes import CodesTable
    from ..corpus.stats import Stats


def detokenize(
    sources: list[Path], target: Path, model: str, audio_format: str, webdataset: bool, codebooks: int | None,
    device: str, dtype: str, impl: str, force: bool,
) -> None:  # fmt: skip
    table = _table(sources)
    from ..corpus.detokenize import detokenize as run

    table.codebooks(codebooks)
    output_format(Path(f"audio.{audio_format}"))
    codec = work.load(model, device, dtype, impl)
    with _progress("decoding", table.seconds) as on_progress:
        written = run(
            table.files, target, codec, suffix=audio_format, webdataset=webdataset, num_codebooks=codebooks,
            force=force, name=model, on_progress=on_progress,
        )  # fmt: skip
    skipped = f"; {written.skipped:,} were there" if written.skipped else ""
    report.show([("output", f"{target}: {written.files:,} files, {_hours(written.seconds)} of audio{skipped}")])
    if written.clipped:
        report.note(f"{written.clipped:,} samples outside [-1, 1] were clipped")
    report.note_model(model)


def stats(source: Path, json: Path | None, picture: Path | None) -> None:
    check_installed()
    from ..corpus.stats import stats as count
    from ..io import plot

    work.check_paths([source], [json, picture])
    kind = work.picture(picture)
    with report.busy(f"counting the codes of {source}"):
        found = count(source)
    if json is not None:
        with replacing(json) as part:
            part.write_text(found.to_json(), encoding="utf-8")
    if picture is not None:
        used, perplexity = [level.used for level in found.usage], [level.perplexity for level in found.usage]
        with replacing(picture) as part:
            plot.draw_usage(part, used, perplexity, found.durations, kind)
    _show(found, source)
    report.show(report.picture_rows(picture))


def export(sources: list[Path], target: Path, format: str, codebooks: int | None) -> None:
    table = _table(sources)
    from ..corpus.export import export as run

    with _progress("writing", table.seconds) as on_progress:
        run(table.files, target, format, num_codebooks=codebooks, on_progress=on_progress)
    report.show([("output", f"{target}: {len(table):,} utterances, {_hours(table.seconds)} of audio, as {format}")])


def _table(sources: list[Path]) -> CodesTable:
    """Of one folder, or of one or more shards."""
    check_installed()
    from ..corpus.codes import CodesTable

    return CodesTable(sources[0] if len(sources) == 1 else sources)


def _show(found: Stats, source: Path) -> None:
    failed = f"; {found.errors:,} could not be read" if found.errors else ""
    report.show([
        ("corpus", f"{source}: {found.rows:,} utterances in {found.shards:,} shards{failed}"),
        ("audio", f"{_hours(found.hours * 3600)}, {found.frames:,} frames"),
        ("codec", f"{found.model}, fingerprint {found.fingerprint}"),
    ])  # fmt: skip
    table = Table(title=f"codebooks of {found.histograms.shape[1]} entries", title_justify="left")
    for column in ("codebook", "entries used", "perplexity"):
        table.add_column(column, justify="right")
    for level in found.usage:
        table.add_row(str(level.level), f"{level.used:.1%}", f"{level.perplexity:,.1f}")
    report.print_table(table)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds:,.1f} s"


class _Done(ProgressColumn):
    """Audio done, of all, and how many times faster than real time."""

    def render(self, task: Task) -> Text:
        speed = f", {task.speed:,.0f} times real time" if task.speed else ""
        return Text(f"{_hours(task.completed)} of {_hours(task.total or 0)}{speed}")


@contextmanager
def _progress(label: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """A progress bar over so many seconds of audio: yields a function that advances it."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), _Done(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=seconds)
        yield lambda done: bar.advance(task, done)
