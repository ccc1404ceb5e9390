"""The Ray Data engine: shards of a corpus are computed by actors, on one machine or many.

    numbers of missing shards -> map_batches over a pool of actors -> what each has done

An actor loads the weights once, reads audio itself and does a shard as the local engine does, which it writes to the
output folder. So files, resumption and results are those of the local engine, row for row: a shard that exists is
finished, one whose actor or driver died is computed again, and rows that cannot be read are in its errors. Through Ray
go numbers of shards alone; a `write_parquet` of rows would leave open which of a shard's rows are there.

All nodes must see the output folder and the sources under the same paths, on a shared file system or by URI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InputError, shown
from ..models.codec import Codec
from . import local, manifest, plan, shards


@dataclass(frozen=True)
class Ray:
    """How a cluster computes: the `engine` of `fastmimi.tokenize`.

    actors: their number; each loads the model. By default as many as the cluster's resources allow.
    cpus, gpus: resources of each actor.
    address: of the cluster; "auto" is the one that this machine belongs to. By default the one that `ray.init` has
        connected to, or else a new one on this machine alone.
    """

    actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0
    address: str | None = None

    def check(self, model: object) -> None:
        """Raises InputError, before any work, for settings that are not right and if Ray is not installed."""
        if find_spec("ray") is None:
            raise InputError("the Ray engine needs Ray Data: pip install 'fastmimi[ray]'")
        for name, value in {"cpus": self.cpus, **({} if self.actors is None else {"actors": self.actors})}.items():
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a positive integer, got {shown(value)}")
        if not isinstance(self.gpus, int | float) or not 0 <= self.gpus < float("inf"):
            raise InputError(f"gpus must be a number of at least 0, got {shown(self.gpus)}")
        if isinstance(model, Codec):
            raise InputError("each actor of Ray loads the model: pass its name or folder, not a loaded model")

    def run(
        self, model: object, loading: dict[str, Any], table: pa.Table, what: shards.Run, out: Path,
        numbers: Sequence[int], limits: local.Limits, progress: local.Progress,
    ) -> local.Summary:  # fmt: skip
        """As `local.run`; model and loading: what `fastmimi.load` takes."""
        lengths = plan.lengths(table["duration"].to_numpy(), what.settings.sample_rate)
        missing, summary = local.begin(lengths, what, out, numbers)
        progress(summary)
        if not missing:
            return summary
        import ray

        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False)
        actors = min(self.actors or self._most_actors(ray.cluster_resources()), len(missing))
        done = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        done = done.map_batches(
            _Shards, fn_constructor_args=(str(model), loading, str(out.absolute()), limits, self.cpus), batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors), num_cpus=self.cpus, num_gpus=self.gpus or None,
        )  # fmt: skip
        for shard in done.iter_rows():
            summary.rows += shard["rows"]
            summary.errors += shard["errors"]
            summary.seconds += shard["seconds"]
            summary.finished += 1
            summary.elapsed = perf_counter() - summary.started
            progress(summary)
        return summary

    def _most_actors(self, resources: dict[str, float]) -> int:
        """The number of actors that a cluster's resources allow; raises InputError if there is none."""
        count = resources.get("GPU", 0.0) / self.gpus if self.gpus else resources.get("CPU", 1.0) / self.cpus
        if count < 1:
            raise InputError(f"the cluster has {resources}, an actor needs {self.cpus} CPUs and {self.gpus:g} GPUs")
        return int(count)


class _Shards:
    """An actor."""

    def __init__(self, model: str, loading: dict[str, Any], out: str, limits: local.Limits, cpus: int):
        import torch

        from ..checkpoints import weights

        torch.set_num_threads(cpus)
        self.codec, self.limits, self.out = weights.load(model, **loading), limits, Path(out)
        self.what = shards.Run.read(self.out)
        self.table = manifest.checked(manifest.read(self.out / shards.MANIFEST), str(self.out / shards.MANIFEST))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[float]]:
        done = local.run(
            self.codec, self.table, self.what, self.out, batch["shard"].tolist(), self.limits, lambda _: None
        )
        return {"rows": [done.rows], "errors": [done.errors], "seconds": [done.seconds]}
