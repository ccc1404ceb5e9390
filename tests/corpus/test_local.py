"""The engine of a run: calls of several threads overlap, and its processes stay."""

from __future__ import annotations

import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import fastmimi
from fastmimi import Mimi
from fastmimi.corpus import local, manifest, plan, shards
from fastmimi.corpus.rows import Row

MOST_S = 30  # until what has to happen has happened


def test_calls_overlap(speech: Path, tmp_path: Path, codec: Mimi, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch of one shard waits for the next shard to begin, which another call computes."""
    out = tmp_path / "codes"
    fastmimi.tokenize(speech, out, model=codec, rows_per_shard=5, progress=False)
    paths = shards.shard_files(out)
    before = [pq.read_table(path) for path in paths]
    for path in paths:
        path.unlink()
    what, table = shards.Run.read(out), manifest.read(out / shards.MANIFEST)
    lengths = plan.lengths(table["duration"].to_numpy(), codec.sample_rate)
    numbers = [[batch.rows for batch in plan.batches(lengths, what.rows_of(i), 10_000_000)] for i in (0, 1)]
    ids = table["id"].to_pylist()
    first, last, following = ids[numbers[0][0][0]], ids[numbers[0][-1][0]], ids[numbers[1][0][0]]
    begun = {first: Event(), following: Event()}
    compute, processes = local.Engine._compute, list[object]()

    def watched(self: local.Engine, rows: list[Row], signals: Future[Any] | None) -> list[local.Result]:
        if rows[0].id in begun:
            begun[rows[0].id].set()
        if rows[0].id == last:
            assert begun[following].wait(MOST_S), "the next shard did not begin"
        return compute(self, rows, signals)

    def started(*args: Any, **options: Any) -> Any:
        processes.append(args)
        return popen(*args, **options)

    popen = subprocess.Popen
    monkeypatch.setattr(local.Engine, "_compute", watched)
    monkeypatch.setattr(subprocess, "Popen", started)
    torch.set_num_threads(2)
    try:
        with local.Engine(codec, table, what, out, local.Limits(1, 10_000_000)) as engine, ThreadPoolExecutor() as pool:

            def run(number: int) -> local.Summary:
                summary = local.Summary()
                engine.run([number], summary, lambda _: None)
                return summary

            calls = [pool.submit(run, 0)]
            assert begun[first].wait(MOST_S)
            calls += [pool.submit(run, number) for number in (1, 2)]
            assert [(call.result().rows, call.result().errors) for call in calls] == [(5, 0), (5, 0), (2, 2)]
    finally:
        torch.set_num_threads(1)
    assert [pq.read_table(path) for path in paths] == before
    assert len(processes) == 1  # one reader for all calls
