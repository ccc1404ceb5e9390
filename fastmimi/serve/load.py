"""`python -m fastmimi.serve.load`: clients in real time against a server, and how long their frames take.

Each sends speech in chunks of random sizes, and each chunk when its last sample would exist; codes that come back are
sent to be decoded at once. A client that plays begins with the first audio, after a buffer of its longest chunk, for
which its own audio may wait, and of --playout-ms.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from websockets.exceptions import WebSocketException

from .. import __version__
from ..errors import InputError, one_line
from ..io.files import check_output, replacing
from .client import AsyncClient, Client, ServerError
from .load_client import PLANS, Load, audio_plans, codes_plans, figures, made_clients, run_clients
from .load_figures import QUANTILES, most_clients
from .protocol import Direction

SPEECH = Path(__file__).resolve().parent.parent / "assets" / "198-209-0000.ogg"
MOST_CLIENTS, LONGEST_S = 4096, 3600.0
PACKAGES = ("msgspec", "numpy", "torch", "websockets")
PIPE_WIDTH = 200  # columns if stdout is not a terminal
LATENCIES = {"codes_ms": "codes", "audio_ms": "audio"}
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "both": ("encode", "decode"), "encode": ("encode",), "decode": ("decode",),
}  # fmt: skip

Url = Annotated[str, typer.Option(help="The server, http or https.")]
Clients = Annotated[
    int | None, typer.Option(help=f"How many; with --find, at most. By default 8, and {MOST_CLIENTS} with --find.")
]
Seconds = Annotated[float, typer.Option(help="Audio that each client sends, in real time.")]
Directions = Annotated[Literal["both", "encode", "decode"], typer.Option(help="What streams do.")]
Codebooks = Annotated[int | None, typer.Option(help="Codes of each frame; by default all that the server encodes.")]
Token = Annotated[str | None, typer.Option(help="The server's token.")]
Seed = Annotated[int, typer.Option(help="Of chunks, phases and starting points.")]
ChunkMs = Annotated[str, typer.Option(metavar="SHORTEST:LONGEST", help="Lengths of chunks.")]
PlayoutMs = Annotated[float, typer.Option(help="Buffer of a client that plays, besides its longest chunk.")]
Find = Annotated[bool, typer.Option("--find", help="Search the most clients whose p99 is under --target-ms.")]
TargetMs = Annotated[float, typer.Option(help="Of --find: p99 of the last result of a frame; no playback runs dry.")]
Audio = Annotated[Path, typer.Option(help="Speech to send, in any format that libsndfile reads.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def load(
    url: Url = "http://127.0.0.1:8000", clients: Clients = None, seconds: Seconds = 10.0,
    directions: Directions = "both", num_codebooks: Codebooks = None, token: Token = None, seed: Seed = 0,
    chunk_ms: ChunkMs = "10:200", playout_ms: PlayoutMs = 80.0, find: Find = False, target_ms: TargetMs = 80.0,
    audio: Audio = SPEECH, json_file: Json = None,
) -> None:  # fmt: skip
    count = clients if clients is not None else MOST_CLIENTS if find else 8
    _check("clients", count, 1, MOST_CLIENTS)
    _check("seconds", seconds, 0.1, LONGEST_S)
    _check("playout-ms", playout_ms, 0, 60_000)
    _check("seed", seed, 0, 2**63 - 1)
    if json_file is not None:
        check_output(json_file, [audio])
    asked = Load(
        url, token, DIRECTIONS[directions], num_codebooks, seconds, chunk_seconds(chunk_ms), playout_ms / 1e3, seed
    )
    result = asyncio.run(_levels(asked, audio, count, target_ms if find else None))
    if json_file is not None:
        with replacing(json_file) as part:
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result["levels"], result["most_clients"])
    last = result["levels"][-1]
    if (find and not result["most_clients"]) or (not find and last["failed"]):
        raise typer.Exit(1)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InputError(f"--{name} must be from {least:g} to {most:g}, got {value:g}")


def chunk_seconds(text: str) -> tuple[float, float]:
    """'10:200' in seconds; raises InputError."""
    try:
        shortest, longest = (float(part) / 1e3 for part in text.split(":"))
    except ValueError:
        shortest = longest = 0.0
    if not 0.001 <= shortest <= longest <= 10:
        raise InputError(f"--chunk-ms must be SHORTEST:LONGEST, from 1 to 10000, got {text[:80]!r}")
    return shortest, longest


async def _levels(load: Load, audio: Path, count: int, target_ms: float | None) -> dict[str, Any]:
    """Run one level, or search where there is a target."""
    async with AsyncClient(load.url, load.token).stream(load.directions, num_codebooks=load.num_codebooks) as stream:
        ready = stream.ready
    plan_count = min(count, PLANS)
    plans = (
        audio_plans(audio, ready, load, plan_count)
        if "encode" in load.directions
        else codes_plans(ready, load, plan_count)
    )
    console = Console(stderr=True, highlight=False, markup=False)
    before, levels = await _health(load), list[dict[str, Any]]()

    async def level(number: int) -> dict[str, Any]:
        made = made_clients(number, plans, ready, load)
        with console.status(f"{number} clients for {load.seconds:g} s", refresh_per_second=2):
            cpu, wall = time.process_time(), time.perf_counter()
            await run_clients(made)
            found = figures(made, time.process_time() - cpu, time.perf_counter() - wall)
        levels.append(found)
        console.print(f"{number} clients: {_outcome(found)}")
        return found

    async def passes(number: int) -> bool:
        return passed(await level(number), target_ms or 0.0)

    most = await most_clients(passes, count) if target_ms is not None else None
    if target_ms is None:
        await level(count)
    return {
        "options": asdict(load) | {"token": None, "audio": str(audio), "target_ms": target_ms},
        "machine": {"processor": processor(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {"fastmimi": __version__} | {name: version(name) for name in PACKAGES},
        "server": {"model": ready.model, "before": before, "after": await _health(load)},
        "levels": levels,
        "most_clients": most,
    }


def passed(level: dict[str, Any], target_ms: float) -> bool:
    """Whether no client of a level failed or ran dry, and the slower kind of result has its p99 under the target."""
    p99 = [level[name]["p99"] for name in LATENCIES if level[name]["p99"] is not None]
    return not level["failed"] and not level["underruns"] and bool(p99) and max(p99) < target_ms


async def _health(load: Load) -> Any:
    client = Client(load.url, load.token)
    return json.loads(await asyncio.get_running_loop().run_in_executor(None, client.health))


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# Output


def _print(levels: list[dict[str, Any]], most: int | None) -> None:
    columns = ["clients", "failed", "lost frames", "underruns"]
    columns += [f"{name} {quantile}" for name in LATENCIES.values() for quantile in QUANTILES]
    table = Table(*columns, "sent late p99", "generator's CPU", title="ms from sent to received", title_justify="left")
    for level in levels:
        table.add_row(
            str(level["clients"]), str(level["failed"]), str(level["frames_lost"]), str(level["underruns"]),
            *(_ms(level[name][quantile]) for name in LATENCIES for quantile in QUANTILES),
            _ms(level["sent_late_ms"]["p99"]), f"{level['generator_cpu']:.0%}",
        )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
    for what in ("refused", "errors"):
        for sentence, number in levels[-1][what].items():
            typer.echo(f"{what}: {number} x {sentence}")
    if most is not None:
        typer.echo(f"most clients: {most}")


def _outcome(level: dict[str, Any]) -> str:
    p99 = ", ".join(f"{name} p99 {_ms(level[key]['p99'])} ms" for key, name in LATENCIES.items())
    return f"{p99}, {level['underruns']} underruns, {level['failed']} failed"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> None:
    """Exit code 0; 1 if a client failed, or the server cannot be had; 2 for wrong options."""
    try:
        app(prog_name="python -m fastmimi.serve.load")
    except InputError as error:
        sys.exit(_complain(error, 2))
    except (ServerError, WebSocketException, OSError, asyncio.TimeoutError) as error:
        sys.exit(_complain(error, 1))


def _complain(error: Exception, code: int) -> int:
    typer.echo(f"error: {one_line(error)}", err=True)
    return code


if __name__ == "__main__":
    main()
