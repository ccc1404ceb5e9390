"""Tokenise a corpus on this machine: processes read, threads compute, shards are written as they are finished."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import InputError, shown
from . import manifest, plan, shards
from .encoding import encode_batch, encode_long
from .reader import Reader
from .rows import Row

if TYPE_CHECKING:
    from ..models.codec import Codec

BATCH_SECONDS, BATCH_SECONDS_ACCELERATOR = 60, 1200  # of audio with padding, where memory allows it
COPIES = 3  # of a batch at a time: its blocks, its signals, its tensor
MIB = 1 << 20


@dataclass
class Summary:
    """What a run has done so far, or in all.

    rows, seconds: tokenised by this run, with how much audio that is; errors: rows that could not be read.
    shards, finished: this job's shards, and how many of them are finished, by this run or before.
    total_seconds: of audio that this run has to do, as far as durations are known.
    """

    rows: int = 0
    errors: int = 0
    seconds: float = 0.0
    shards: int = 0
    finished: int = 0
    total_seconds: float = 0.0
    started: float = field(default_factory=perf_counter)
    elapsed: float = 0.0  # seconds

    @property
    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.seconds / self.elapsed if self.elapsed else 0.0


Progress = Callable[[Summary], None]
Result = tuple[np.ndarray, int] | str  # codes [K, T] and samples, or what is wrong


@dataclass
class _Shard:
    """A shard that is being computed."""

    number: int
    table: pa.Table  # its rows of the manifest
    first: int  # the number of the first of them
    results: dict[int, Result] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How many readers there are, and how much audio with padding, in samples, is in a batch."""

    readers: int
    batch: int

    @classmethod
    def of(cls, codec: Codec, readers: int | None, memory_mb: int) -> Limits:
        """Raises InputError for numbers that are not positive."""
        cpu = codec.device.type == "cpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        readers = max(1, cores // 4 if cpu else cores - 2) if readers is None else readers
        for name, value in {"readers": readers, "memory_mb": memory_mb}.items():
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a positive integer, got {shown(value)}")
        per_sample = 4 * codec.config.audio_channels * COPIES * (cls.ahead_of(readers) + 1)
        wanted = (BATCH_SECONDS if cpu else BATCH_SECONDS_ACCELERATOR) * codec.sample_rate
        return cls(readers, max(codec.frame_size, min(wanted, memory_mb * MIB // per_sample)))

    @staticmethod
    def ahead_of(readers: int) -> int:
        return 2 * readers

    @property
    def ahead(self) -> int:
        """Batches that are read before they are needed."""
        return self.ahead_of(self.readers)


def run(
    codec: Codec, table: pa.Table, what: shards.Run, out: Path, part: plan.Part, limits: Limits, progress: Progress
) -> Summary:  # fmt: skip
    """Write the shards of a manifest that are not there yet; `out` has its settings already."""
    lengths = plan.lengths(table["duration"].to_numpy(), codec.sample_rate)
    mine = part.of(what.num_shards)
    missing = [shard for shard in mine if not shards.shard_path(out, shard).exists()]
    summary = Summary(shards=len(mine), finished=len(mine) - len(missing))
    summary.total_seconds = sum(int(lengths[_slice(what.rows_of(s))].sum()) for s in missing) / codec.sample_rate
    columns = shards.schema(what.settings, shards.carried_of(table.schema))
    progress(summary)

    def work() -> Iterator[tuple[_Shard, plan.Batch, list[Row]]]:
        for number in missing:
            rows = what.rows_of(number)
            shard = _Shard(number, table.slice(rows.start, len(rows)), rows.start)
            as_rows = manifest.rows_of(shard.table)
            for batch in plan.batches(lengths, rows, limits.batch):
                yield shard, batch, [as_rows[row - rows.start] for row in batch.rows]

    for shard, batch, results in _computed(codec, work(), limits):
        shard.results.update(zip(batch.rows, results, strict=True))
        done = [result for result in results if not isinstance(result, str)]
        summary.rows, summary.errors = summary.rows + len(done), summary.errors + len(results) - len(done)
        summary.seconds += sum(samples for _, samples in done) / codec.sample_rate
        if len(shard.results) == shard.table.num_rows:
            _write(out, shard, columns, codec.sample_rate)
            summary.finished += 1
        summary.elapsed = perf_counter() - summary.started
        progress(summary)
    if all(shards.shard_path(out, shard).exists() for shard in range(what.num_shards)):
        shards.join_errors(out, what.num_shards)
        for left in out.glob(".*.part"):  # of runs that were killed
            left.unlink(missing_ok=True)
    return summary


def _computed(
    codec: Codec, work: Iterable[tuple[_Shard, plan.Batch, list[Row]]], limits: Limits
) -> Iterator[tuple[_Shard, plan.Batch, list[Result]]]:
    """The work with its results, in order; the next batches are read meanwhile."""
    idle: SimpleQueue[Reader] = SimpleQueue()
    readers = [Reader(codec.sample_rate, codec.config.audio_channels) for _ in range(limits.readers + 1)]
    for reader in readers[1:]:
        idle.put(reader)

    def read(rows: list[Row]) -> list[np.ndarray | str]:
        reader = idle.get()
        try:
            return reader.read(rows)
        finally:
            idle.put(reader)

    with ExitStack() as stack:
        pool = ThreadPoolExecutor(limits.readers)
        stack.callback(pool.shutdown, cancel_futures=True)
        for reader in readers:
            stack.callback(reader.close)  # before the pool waits for its threads
        waiting: deque[tuple[_Shard, plan.Batch, list[Row], Future[Any] | None]] = deque()
        for shard, batch, rows in work:
            waiting.append((shard, batch, rows, None if batch.long else pool.submit(read, rows)))
            if len(waiting) > limits.ahead:
                yield _result(codec, readers[0], limits, *waiting.popleft())
        while waiting:
            yield _result(codec, readers[0], limits, *waiting.popleft())


def _result(
    codec: Codec, reader: Reader, limits: Limits, shard: _Shard, batch: plan.Batch, rows: list[Row],
    read: Future[list[np.ndarray | str]] | None,
) -> tuple[_Shard, plan.Batch, list[Result]]:  # fmt: skip
    if read is not None:
        return shard, batch, encoded(codec, read.result(), limits.batch)
    try:
        return shard, batch, [encode_long(codec, reader.blocks(rows[0]))]
    except InputError as error:
        return shard, batch, [str(error)]


def encoded(codec: Codec, signals: Sequence[np.ndarray | str], budget: int) -> list[Result]:
    """The codes and samples of each signal [n, channels], at most `budget` samples at a time; errors are kept."""
    read = {i: signal for i, signal in enumerate(signals) if not isinstance(signal, str)}
    lengths = np.array([len(signal) for signal in read.values()], np.int64)
    found: dict[int, Result] = {i: signal for i, signal in enumerate(signals) if isinstance(signal, str)}
    numbers = [*read]
    for batch in plan.batches(lengths, range(len(read)), budget):  # lengths may differ from those of the manifest
        some = [numbers[row] for row in batch.rows]
        codes = encode_batch(codec, [read[i] for i in some])
        found.update({i: (row, len(read[i])) for i, row in zip(some, codes, strict=True)})
    return [found[i] for i in range(len(signals))]


def _write(out: Path, shard: _Shard, columns: pa.Schema, sample_rate: int) -> None:
    rows, codes, errors = [], [], []
    for number, row in enumerate(shard.table.to_pylist(), shard.first):
        result = shard.results[number]
        if isinstance(result, str):
            errors.append((row["id"], row["uri"], result))
            continue
        found, samples = result
        codes.append(found)
        rows.append({**row, "source": row["uri"], "duration": samples / sample_rate, "sample_rate": sample_rate})
    shards.write_shard(out, shard.number, shards.table_of(rows, codes, columns), errors)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
