"""The commands `tokenize`, `corpus manifest` and `corpus verify`: options, checks before any work, what they print."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, shown

if TYPE_CHECKING:
    from ..corpus.local import Summary
    from ..corpus.verify import Report

REQUIRED_PACKAGES = ("fsspec", "pyarrow")

app = typer.Typer(
    help="What belongs to tables of codes (needs pip install 'fastmimi[corpus]').", no_args_is_help=True,
    rich_markup_mode="markdown",
)  # fmt: skip

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder, a glob, a manifest (.parquet, .jsonl, .csv), .tar archives, hf:NAME, or Lhotse cuts; "
        "local, or a URI of fsspec.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that `fastmimi tokenize` wrote to.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder for shards of codes; run again, it goes on.")]
ManifestOut = Annotated[Path, typer.Argument(metavar="OUT", help="The manifest to write: .parquet, .jsonl or .csv.")]
Kind = Annotated[
    str | None,
    typer.Option(help="What SOURCE is, if its name does not tell: folder, glob, manifest, parquet, dataset, "
                      "webdataset or lhotse."),
]  # fmt: skip
Model = Annotated[str, typer.Option(help="A directory, a .safetensors file, a hub id, demo, or [jodio-]random[:seed].")]
SameModel = Annotated[str | None, typer.Option("--model", help="By default the one that the codes were made with.")]
Codebooks = Annotated[int | None, typer.Option(help="Number of codebooks; by default all.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; the codebook search is always in float32.")]
Impl = Annotated[str, typer.Option(help="auto, reference, triton, cpu or onednn; see `fastmimi explain`.")]
Shard = Annotated[str, typer.Option(help="i/n, with i from 0: do only each n-th shard, for arrays of jobs.")]
PerShard = Annotated[int, typer.Option(help="Rows of a shard; a run that is killed loses at most the one at work.")]
Readers = Annotated[int | None, typer.Option(help="Processes that read audio; by default one for four cores.")]
Memory = Annotated[int, typer.Option(help="MiB that audio may take which is read and computed.")]
Threads = Annotated[int | None, typer.Option(help="PyTorch's threads; by default as many as there are cores.")]
Engine = Annotated[str, typer.Option(help="local, or ray: actors of a Ray cluster (pip install 'fastmimi[ray]').")]
Actors = Annotated[
    int | None, typer.Option(help="Number of Ray actors; by default as many as the cluster's resources allow.")
]
Cpus = Annotated[int | None, typer.Option(help="CPUs of each Ray actor; by default a node's, shared by its actors.")]
Gpus = Annotated[float, typer.Option(help="GPUs of each Ray actor, such as 1 or 0.25; with --device cuda.")]
Address = Annotated[str | None, typer.Option(help="The Ray cluster; auto is this machine's. By default a new one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress in the terminal.")]
Sample = Annotated[int, typer.Option(help="Rows to encode again.")]
Seed = Annotated[int, typer.Option(help="Draws which rows.")]


def check_installed() -> None:
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"corpora need {', '.join(missing)}: pip install 'fastmimi[corpus]'")


def tokenize(
    source: Source, out: Out, model: Model = "kyutai/mimi", codebooks: Codebooks = None, device: Device = "cpu",
    dtype: Dtype = "float32", impl: Impl = "auto", kind: Kind = None, shard: Shard = "0/1",
    rows_per_shard: PerShard = 1000, readers: Readers = None, memory_mb: Memory = 512, threads: Threads = None,
    engine: Engine = "local", actors: Actors = None, cpus: Cpus = None, gpus: Gpus = 0.0, address: Address = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Encode a corpus to shards of codes in Parquet; run again, it goes on (needs pip install 'fastmimi[corpus]')."""
    check_installed()
    import torch

    from ..corpus.ray import Ray
    from ..corpus.tokenize import tokenize
    from . import report, work

    if engine not in ("local", "ray"):
        raise InputError(f"--engine must be local or ray, got {shown(engine)}")
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be positive, got {threads}")
        torch.set_num_threads(threads)
    done = tokenize(
        source, out, model=model, num_codebooks=codebooks, device=device, dtype=work.dtype_of(dtype), impl=impl,
        kind=kind, shard=shard, rows_per_shard=rows_per_shard, readers=readers, memory_mb=memory_mb,
        progress=not quiet, engine=Ray(actors, cpus, gpus, address) if engine == "ray" else None,
    )  # fmt: skip
    report.show(_summary_rows(done, out))


@app.command()
def manifest(source: Source, out: ManifestOut, kind: Kind = None, quiet: Quiet = False) -> None:
    """List a corpus: its rows with ids, places and durations, for `fastmimi tokenize` or to be edited first."""
    check_installed()
    import pyarrow.compute as pc

    from ..corpus import manifest, sources
    from ..corpus.progress import Bars
    from . import report

    manifest.writable(out)
    with Bars(not quiet) as bars:
        table = sources.table_of(source, kind, bars.probing)
    manifest.write(table, out)
    hours, unknown = (pc.sum(table["duration"]).as_py() or 0.0) / 3600, table["duration"].null_count
    more = f", {unknown} of unknown duration" if unknown else ""
    report.show([("manifest", f"{out}: {table.num_rows} rows, {hours:.2f} h{more}")])


@app.command()
def verify(
    folder: Folder, model: SameModel = None, device: Device = "cpu", impl: Impl = "auto", sample: Sample = 20,
    seed: Seed = 0, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Check that each row is there once, and encode some again; exit code 1 if something is wrong."""
    check_installed()
    from ..corpus import shards
    from ..corpus.progress import Bars
    from ..corpus.verify import verify
    from . import report, work

    made_with = shards.Run.read(folder).settings
    codec = work.load(model or made_with.model, device, made_with.dtype, impl, made_with.num_codebooks)
    with Bars(not quiet) as bars:
        found = verify(folder, codec, sample=sample, seed=seed, progress=bars.verifying)
    report.show(_report_rows(found))
    if found.wrong:
        raise typer.Exit(1)


def _summary_rows(done: Summary, out: Path) -> list[tuple[str, str]]:
    hours, errors = done.seconds / 3600, f", {done.errors} not readable" if done.errors else ""
    rows = [("codes", f"{out}: {done.finished} of {done.shards} shards")]
    rows.append(("rows", f"{done.rows}{errors}" if done.elapsed else "none left to do"))
    if done.elapsed:
        rows.append(("audio", f"{hours:.3f} h in {done.elapsed:.1f} s, {done.speed:.3g} times real time"))
    if done.errors:
        rows.append(("errors", f"{out / 'errors'}: which rows, and why"))
    return rows


def _report_rows(found: Report) -> list[tuple[str, str]]:
    missing = f", {found.missing} shards are not finished" if found.missing else ""
    rows = [("rows", f"{found.rows}, and {found.errors} that could not be read{missing}")]
    rows.append(("checked", f"{found.checked} rows encoded again"))
    rows += [("unread", text) for text in found.unreadable]
    return [
        *rows,
        *(("wrong", text) for text in found.wrong),
        ("result", "wrong" if found.wrong else "as it should be"),
    ]
