"""The Ray Data engine: shards of a corpus are computed by actors, on one machine or many.

    numbers of missing shards -> map_batches over a pool of actors -> what each has done

An actor keeps one local engine: it loads the weights once, reads audio itself and writes shards to the output folder.
Ray Data gives it two shards at a time, so that the second is read while the first one's last batches are computed, and
cores do not wait between shards. Files, resumption and results are those of the local engine, row for row: a shard that
exists is finished, one whose actor or driver died is computed again, and rows that cannot be read are in its errors.
Through Ray go numbers of shards alone; a `write_parquet` of rows would leave open which of a shard's rows are there.

All nodes must see the output folder and the sources under the same paths, on a shared file system or by URI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError, shown
from ..models.codec import Codec
from . import local, manifest, plan, shards

AT_A_TIME = 2  # shards of an actor


@dataclass(frozen=True)
class Ray:
    """How a cluster computes: the `engine` of `fastmimi.tokenize`.

    actors: their number; each loads the model. By default as many as the cluster's resources allow.
    cpus: threads of each actor, and CPUs that it takes. By default a node's divided by its actors, of which there is
        one, or with GPUs as many as these allow.
    gpus: that each actor takes.
    address: of the cluster; "auto" is the one that this machine belongs to. By default the one that `ray.init` has
        connected to, or else a new one on this machine alone.
    """

    actors: int | None = None
    cpus: int | None = None
    gpus: float = 0.0
    address: str | None = None

    def check(self, model: object) -> None:
        """Raises InputError, before any work, for settings that are not right and if Ray is not installed."""
        if find_spec("ray") is None:
            raise InputError("the Ray engine needs Ray Data: pip install 'fastmimi[ray]'")
        for name, value in {"cpus": self.cpus, "actors": self.actors}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive integer, got {shown(value)}")
        if not isinstance(self.gpus, int | float) or not 0 <= self.gpus < float("inf"):
            raise InputError(f"gpus must be a number of at least 0, got {shown(self.gpus)}")
        if isinstance(model, Codec):
            raise InputError("each actor of Ray loads the model: pass its name or folder, not a loaded model")

    def run(
        self, model: object, loading: dict[str, Any], table: pa.Table, what: shards.Run, out: Path,
        numbers: Sequence[int], readers: int | None, memory_mb: int, progress: local.Progress,
    ) -> local.Summary:  # fmt: skip
        """As `local.run`; model and loading: what `fastmimi.load` takes; readers and memory_mb are of each actor."""
        lengths = plan.lengths(table["duration"].to_numpy(), what.settings.sample_rate)
        missing, summary = local.begin(lengths, what, out, numbers)
        progress(summary)
        if not missing:
            return summary
        import ray

        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False)
        actors, cpus = self._fitting([node["Resources"] for node in ray.nodes() if node["Alive"]])
        done = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        pool, options = _pool(min(actors, len(missing)))
        done = done.map_batches(
            _Shards, fn_constructor_args=(str(model), loading, str(out.absolute()), readers, memory_mb, cpus),
            batch_size=1, compute=pool, num_cpus=cpus, num_gpus=self.gpus or None, **options,
        )  # fmt: skip
        for shard in done.iter_rows():
            summary.rows += shard["rows"]
            summary.errors += shard["errors"]
            summary.seconds += shard["seconds"]
            summary.finished += 1
            summary.elapsed = perf_counter() - summary.started
            progress(summary)
        return summary

    def _fitting(self, nodes: list[dict[str, float]]) -> tuple[int, int]:
        """How many actors nodes with these resources get, and CPUs of each; raises InputError if they have too few."""
        hosts = []  # CPUs of a node, and the most actors that it may have
        for node in nodes:
            cpus = int(node.get("CPU", 0))
            most = int(node.get("GPU", 0) / self.gpus) if self.gpus else cpus
            if cpus and most:
                hosts.append((cpus, most))
        wanted = -(-(self.actors or 1) // max(1, len(hosts)))  # actors of each node, where GPUs do not say
        shares = [max(1, cpus // (most if self.gpus else wanted)) for cpus, most in hosts]
        cpus = self.cpus or min(shares, default=1)
        fitting = sum(min(have // cpus, most) for have, most in hosts)
        if not fitting:
            raise InputError(f"the nodes have {nodes}, an actor needs {cpus} CPUs and {self.gpus:g} GPUs")
        return self.actors or fitting, cpus


def _pool(actors: int) -> tuple[Any, dict[str, int]]:
    """A pool of actors that each get `AT_A_TIME` shards, and what `map_batches` has to know of it before Ray 2.60."""
    from ray.data import ActorPoolStrategy

    at_a_time = {"size": actors, "max_tasks_in_flight_per_actor": AT_A_TIME}
    if "max_concurrent_calls_per_actor" in signature(ActorPoolStrategy).parameters:
        return ActorPoolStrategy(**at_a_time, max_concurrent_calls_per_actor=AT_A_TIME), {}
    return ActorPoolStrategy(**at_a_time), {"max_concurrency": AT_A_TIME}


class _Shards:
    """An actor."""

    def __init__(self, model: str, loading: dict[str, Any], out: str, readers: int | None, memory_mb: int, cpus: int):
        import torch

        from ..checkpoints import weights

        torch.set_num_threads(cpus)
        folder = Path(out)
        codec, what = weights.load(model, **loading), shards.Run.read(folder)
        table = manifest.checked(manifest.read(folder / shards.MANIFEST), str(folder / shards.MANIFEST))
        limits = local.Limits.of(codec, readers, memory_mb, cpus)
        self.engine = local.Engine(codec, table, what, folder, limits)

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[float]]:
        return await asyncio.to_thread(self._done, batch["shard"].tolist())

    def _done(self, numbers: list[int]) -> dict[str, list[float]]:
        engine = self.engine
        missing, done = local.begin(engine.lengths, engine.what, engine.out, numbers)
        engine.run(missing, done, lambda _: None)
        return {"rows": [done.rows], "errors": [done.errors], "seconds": [done.seconds]}
