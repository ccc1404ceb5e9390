"""`fastmimi.tokenize`: a source of audio to a folder of shards of codes; run again, it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from ..checkpoints import weights
from ..errors import InputError, shown
from ..io.files import path_of
from ..models import checks
from ..models.codec import Codec
from ..runtime import dispatch
from . import local, manifest, plan, shards, sources

if TYPE_CHECKING:
    from .progress import Bars
    from .ray import Ray


def tokenize(
    source: str | Path, out: str | Path, *, model: str | Path | Codec = "kyutai/mimi",
    num_codebooks: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    impl: dispatch.Impl = "auto", kind: str | None = None, shard: str = "0/1", rows_per_shard: int = 1000,
    readers: int | None = None, memory_mb: int = 512, progress: bool = True, engine: Ray | None = None,
) -> local.Summary:  # fmt: skip
    """Encode all audio of a source to shards of codes in the folder `out`, which is made; needs the extra [corpus].

    Codes are those of `encode` of each row alone. Run again, it goes on where it was stopped, however that happened,
    with the manifest that it began with. Rows that cannot be read are in `out`/errors.parquet, with the reason.

    Args:
        source: a folder, a glob, a manifest, archives, a data set, cuts: see `fastmimi.corpus.sources`.
        out: the folder, whose files `fastmimi.corpus.shards` describes.
        model: what `fastmimi.load` takes, or a codec; `device`, `dtype`, `impl` are for the former.
        num_codebooks: by default all of the model's, or of a codec those that its `encode` yields.
        kind: of the source, where its name does not tell.
        shard: "i/n", with i from 0: of all shards, this call does each n-th, beginning with the i-th.
        rows_per_shard: rows that a run which is killed may lose.
        readers: processes that read audio; by default one for four cores, on an accelerator one a core.
        memory_mb: MiB that audio may take which is read or computed, beside the model, its activations and processes.
        progress: show a bar, if stderr is a terminal.
        engine: by default this machine; `fastmimi.corpus.ray.Ray()` computes shards in actors of a Ray cluster.

    Raises InputError before any work for arguments, a source or a manifest that are not right, and if `out` is of a run
    with another manifest, model, number of codebooks, dtype or format.
    """
    from .progress import Bars

    out, part = path_of(out, "out"), plan.Part.parse(shard)
    if type(rows_per_shard) is not int or rows_per_shard < 1:
        raise InputError(f"rows_per_shard must be a positive integer, got {shown(rows_per_shard)}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder")
    before = shards.Run.read(out) if (out / shards.SETTINGS).exists() else None
    if before is None and out.is_dir() and any(path.name[:1] != "." for path in out.iterdir()):
        raise InputError(f"{out} is not empty, and has no {shards.SETTINGS} of a run that could go on")
    with Bars(progress) as bars:
        if engine is not None:
            engine.check(model)
        codec = _codec(model, num_codebooks, device, dtype, impl, bars)
        limits = local.Limits.of(codec, readers, memory_mb)
        table = (
            _manifest_of_before(before, source, kind, out) if before else sources.table_of(source, kind, bars.probing)
        )
        what = shards.Run(
            shards.Settings.of(codec, str(model) if not isinstance(model, Codec) else type(model).__name__),
            sources.absolute(source), table.num_rows, manifest.digest(table), rows_per_shard,
        )  # fmt: skip
        if before is None:
            before = _begin(what, table, out)
        if (difference := before.difference(what)) is not None:
            raise InputError(f"{out} is of a run with other settings: {difference}; pass another folder")
        numbers = part.of(what.num_shards)
        if engine is None:
            done = local.run(codec, table, what, out, numbers, limits, bars.tokenizing)
        else:
            loading = {"device": device, "dtype": dtype, "impl": impl, "num_codebooks": num_codebooks}
            done = engine.run(model, loading, table, what, out, numbers, readers, memory_mb, bars.tokenizing)
        shards.finish(out, what, alone=part.count == 1)
        return done


def _manifest_of_before(before: shards.Run, source: str | Path, kind: str | None, out: Path) -> pa.Table:
    """The manifest that a run began with: the files that it was made from may have changed or vanished since.

    Raises InputError if the source is another one, or a manifest that says something else now.
    """
    path, same = out / shards.MANIFEST, sources.absolute(source) == before.source
    table = manifest.read(path)
    if manifest.digest(table) != before.manifest:
        raise InputError(f"{path} is not the manifest that the run in {out} began with")
    if same and not Path(source).is_file():
        return table
    if (kind or sources.kind_of(source)) == "manifest":
        if manifest.digest(manifest.read(source)) != before.manifest:
            raise InputError(f"{source} is not the manifest that the run in {out} began with; pass another folder")
    elif not same:
        raise InputError(f"{out} is of a run over {before.source}, got {source}; pass another folder")
    return table


def _begin(what: shards.Run, table: pa.Table, out: Path) -> shards.Run:
    """Write the manifest and settings of a new run; returns those on disk, which another job may have replaced."""
    out.mkdir(parents=True, exist_ok=True)
    shards.write_table(table, out / shards.MANIFEST)
    what.write(out)
    return shards.Run.read(out)


def _codec(
    model: str | Path | Codec, num_codebooks: int | None, device: str | torch.device, dtype: torch.dtype,
    impl: dispatch.Impl, bars: Bars,
) -> Codec:  # fmt: skip
    if not isinstance(model, Codec):
        bars.note(f"loading {model}")
        codec = weights.load(model, device=device, dtype=dtype, impl=impl, num_codebooks=num_codebooks)
    else:
        codec = model
        if num_codebooks is not None and num_codebooks != codec.num_codebooks:
            raise InputError(f"the codec encodes {codec.num_codebooks} codebooks, got num_codebooks={num_codebooks}")
    checks.has_part(codec.encoder, "encoder", "tokenize")
    return codec
