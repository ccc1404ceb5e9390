"""Output of the commands: results on stdout; notes, progress and errors on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import numpy as np

    from ..devtools.costs import Stage
    from ..io.audio import AudioFile
    from ..io.tokens import Tokens
    from ..io.transcode import Clock
    from ..runtime.dispatch import Choice

Rows = list[tuple[str, str]]
Blocks = Iterable["np.ndarray"]

SHOWN_CODEBOOKS, SHOWN_FRAMES = 3, 10
PIPE_WIDTH = 400  # columns if stdout is not a terminal: wide enough that no table breaks its lines


def show(*groups: Rows) -> None:
    """Print rows as lines of a label and a text."""
    for label, text in (row for rows in groups for row in rows):
        typer.echo(f"{label:<9}{text}")


def note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def note_model(model: str) -> None:
    """For a demonstration or random model, say what its audio sounds like and how to get the trained model."""
    if model == "demo":
        note(
            "demo is a small demonstration model (docs/demo.md); for Mimi's own quality pass "
            "--model kyutai/mimi (or no --model), which fetches trained weights"
        )
    if re.fullmatch(r"(\w+-)?random(:\d+)?", model):
        note(
            f"{model} has random weights: the decoded audio is noise, by design; for speech pass "
            "--model kyutai/mimi (or no --model), which fetches trained weights"
        )


# Rows that describe what was done


def input_rows(file: AudioFile) -> Rows:
    return [("input", f"{file.path}: {_describe(file)}, {_size(file.path)}")]


def codes_rows(tokens: Tokens) -> Rows:
    """The shape of the codes, and the first frames of the first codebooks."""
    more = " ..." if tokens.num_frames > SHOWN_FRAMES else ""
    excerpt = [
        ("", f"  {number:>2}: {' '.join(f'{code:>4}' for code in row[:SHOWN_FRAMES])}{more}")
        for number, row in enumerate(tokens.codes[:SHOWN_CODEBOOKS], 1)
    ]
    if tokens.num_codebooks > SHOWN_CODEBOOKS:
        excerpt.append(("", "  ..."))
    return [("codes", f"{_shape(tokens)}, {tokens.duration:.2f} s"), *excerpt]


def tokens_rows(tokens: Tokens, path: Path | None) -> Rows:
    """The token file and its size; without a path, the size that it would have."""
    where = str(path) if path is not None else "not written (--tokens FILE)"
    size = _size(path) if path is not None else f"{len(tokens.to_bytes()):,} bytes"
    return [("tokens", f"{where}: {size}, {_rate(tokens)}")]


def speed_rows(label: str, clock: Clock, tokens: Tokens, stream: bool) -> Rows:
    text = f"{clock.seconds:.2f} s, {tokens.duration / clock.seconds:.3g} times real time"
    if stream:
        mean, frame = clock.seconds / clock.steps * 1000, 1000 / tokens.frame_rate
        text += f"; a frame of {frame:g} ms took {mean:.1f} ms, the slowest {clock.slowest * 1000:.1f} ms"
    return [(label, text)]


def output_rows(path: Path, tokens: Tokens) -> Rows:
    return [("output", f"{path}: {tokens.duration:.2f} s, {tokens.sample_rate} Hz, {_size(path)}")]


def quality_rows(model: str, source: Path) -> Rows:
    """What was measured when the model `demo` was published, for a clip that was used for it; else nothing."""
    from ..checkpoints.weights import DEMO

    measured = json.loads((DEMO / "evaluation.json").read_text())["files"] if model == "demo" else []
    texts = [
        f"{row['codebooks']:>2} codebooks, as published: STOI {row['stoi']:.2f}, ESTOI {row['estoi']:.2f}, "
        f"PESQ {row['pesq']:.2f}, SI-SDR {row['si_sdr']:.1f} dB"
        for row in measured
        if row["file"] == source.name
    ]
    return [("" if i else "quality", text) for i, text in enumerate(texts)]


def picture_rows(path: Path | None) -> Rows:
    return [("picture", f"{path}: {_size(path)}")] if path is not None else []


def _describe(file: AudioFile) -> str:
    plural = "" if file.channels == 1 else "s"
    kind = f"{file.format} {file.subtype}"
    return f"{file.duration:.2f} s, {file.sample_rate} Hz, {file.channels} channel{plural}, {kind}"


def _shape(tokens: Tokens) -> str:
    return f"{tokens.num_codebooks} codebooks x {tokens.num_frames} frames, entries of {tokens.codebook_size}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def _rate(tokens: Tokens) -> str:
    if tokens.packed:
        return f"{tokens.kbps:.2f} kbps, packed in {tokens.bits_per_code} bits a code"
    return f"{tokens.kbps:.2f} kbps as {tokens.stored_type}"


# Tables


def tokens(tokens: Tokens, path: Path) -> None:
    _table(
        "token file",
        [
            ("file", f"{path}, {_size(path)}"),
            ("duration", f"{tokens.duration:.3f} s, {tokens.length} samples at {tokens.sample_rate} Hz"),
            ("codes", _shape(tokens)),
            ("frames", f"{tokens.frame_rate:g} a second, of {tokens.frame_size} samples"),
            ("bitrate", _rate(tokens)),
            ("model", tokens.model),
            ("fingerprint", tokens.fingerprint),
        ],
    )


def audio(file: AudioFile) -> None:
    _table(
        "audio file",
        [
            ("file", f"{file.path}, {_size(file.path)}"),
            ("format", f"{file.format} {file.subtype}"),
            ("rate", f"{file.sample_rate} Hz"),
            ("channels", str(file.channels)),
            ("duration", f"{file.duration:.3f} s, {file.frames} samples"),
            ("bitrate", f"{file.path.stat().st_size * 8 / file.duration / 1000:.1f} kbps"),
        ],
    )


def checkpoint(source: str) -> None:
    from ..checkpoints.weights import fingerprint, load

    with busy(f"loading {source}"):
        codec = load(source)
    config = codec.config
    parts = {
        name: sum(p.numel() for module in modules if module is not None for p in module.state_dict().values())
        for name, modules in (
            ("encoder", codec.parts("encode")),
            ("decoder", codec.parts("decode")),
            ("quantizer", [codec.quantizer]),
        )
    }
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items() if count)
    books = "none"
    if codec.total_codebooks:
        semantic = f"{config.num_semantic_quantizers} of them semantic"
        books = f"{codec.total_codebooks}, {semantic}, of {config.codebook_size} entries"
    rows = {
        "model": source,
        "parameters": f"{sum(parts.values()) / 1e6:.2f} M: {listed}",
        "audio": f"{codec.sample_rate} Hz, channels: {config.audio_channels}",
        "frames": f"{codec.frame_rate:g} a second, of {codec.frame_size} samples",
        "codebooks": books,
        **config.summary,
        "streams": "yes" if config.streamable else config.not_streamable_because,
        **({"fingerprint": fingerprint(codec)} if codec.total_codebooks else {}),
    }
    _table("checkpoint", [*rows.items()])


def dispatch(choices: list[Choice], title: str) -> None:
    """The dispatch table."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("op", "runs", "because", "not used"):
        table.add_column(column)
    for choice in choices:
        passed_over = "\n".join(f"{name}: {why}" for name, why in choice.passed_over)
        inside = "".join(f"\n{op} in it: {backend}" for op, backend in choice.inside)
        table.add_row(choice.op, choice.chosen + inside, choice.reason, passed_over)
    print_table(table)


def costs(architectures: dict[str, list[Stage]], ceilings: dict[str, float], device: str) -> None:
    """Print a table for each architecture: the cost of its stages for one second of audio."""
    from ..devtools.costs import total

    for name, stages in architectures.items():
        table = Table(title=f"{name}: both directions, for one second of audio", title_justify="left")
        for column in ("stage", "output Hz", "parameters M", "GFLOP", "MB in fp32", "min. ms"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for stage in (*stages, total(stages)):
            if stage.name == "total":
                table.add_section()
            table.add_row(
                stage.name,
                f"{stage.rate:,.6g}" if stage.rate else "",
                f"{stage.parameters / 1e6:,.2f}",
                f"{stage.flops / 1e9:,.2f}",
                f"{stage.bytes / 1e6:,.1f}",
                f"{sum(s.seconds(ceilings) for s in (stages if stage.name == 'total' else [stage])) * 1000:,.1f}",
            )
        print_table(table)
    typer.echo(
        "MB: each op's inputs and outputs, moved once. Weights are read once per pass: 4 MB per million parameters.\n"
        f"min. ms: lower bound at the peak rates measured now on {device}, {ceilings['fp32 GFLOP/s']:,.0f} GFLOP/s for "
        f"matrix products in fp32 and {ceilings['copy GB/s']:,.0f} GB/s for a copy."
    )


def _table(title: str, rows: Rows) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for label, text in rows:
        table.add_row(label, text)
    print_table(table)


def print_table(table: Table) -> None:
    _stdout().print(table)


def _stdout() -> Console:
    # file names are not markup; a pipe has no width, and lines that are broken at 80 columns are hard to search
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


# Progress


def busy(text: str) -> AbstractContextManager[object]:
    """A spinner, if stderr is a terminal."""
    return Console(stderr=True, markup=False).status(text)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[Blocks], Blocks]]:
    """A progress bar over `total` samples: yields a function that passes on blocks and advances the bar."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def watch(blocks: Blocks) -> Blocks:
            for block in blocks:
                yield block
                bar.advance(task, len(block))

        yield watch
