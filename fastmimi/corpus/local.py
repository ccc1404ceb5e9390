"""Tokenise a corpus on this machine: processes read, threads compute, shards are written as they are finished."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Semaphore
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ..errors import InputError, shown
from ..runtime.openmp import end_workers
from . import manifest, plan, shards
from .encoding import encode_batch, encode_long
from .reader import Reader
from .rows import Row

if TYPE_CHECKING:
    from ..models.codec import Codec

BATCH_SECONDS, BATCH_SECONDS_ACCELERATOR = 60, 1200  # of audio with padding, where memory allows it
MOST_WORKERS = 64
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
class _Work:
    """A batch of a shard."""

    shard: _Shard
    batch: plan.Batch
    rows: list[Row]


@dataclass(frozen=True)
class Limits:
    """How many readers there are, and how much audio with padding, in samples, is in a batch."""

    readers: int
    batch: int

    @classmethod
    def of(cls, codec: Codec, readers: int | None, memory_mb: int, cores: int | None = None) -> Limits:
        """For so many cores, by default all of this process. Raises InputError for numbers that are not positive."""
        cpu = codec.device.type == "cpu"
        if cores is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        readers = max(1, cores // 4 if cpu else cores - 2) if readers is None else readers
        for name, value in {"readers": readers, "memory_mb": memory_mb}.items():
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be a positive integer, got {shown(value)}")
        per_sample = 4 * codec.config.audio_channels * COPIES * (readers + Workers.most(codec) + 1)
        wanted = (BATCH_SECONDS if cpu else BATCH_SECONDS_ACCELERATOR) * codec.sample_rate
        return cls(readers, max(codec.frame_size, min(wanted, memory_mb * MIB // per_sample)))


def run(
    codec: Codec, table: pa.Table, what: shards.Run, out: Path, numbers: Sequence[int], limits: Limits,
    progress: Progress,
) -> Summary:  # fmt: skip
    """Write those of the shards with these numbers that are not there yet; `out` has its settings already."""
    lengths = plan.lengths(table["duration"].to_numpy(), codec.sample_rate)
    missing, summary = begin(lengths, what, out, numbers)
    progress(summary)
    if missing:
        batches = sum(1 for shard in missing for _ in plan.batches(lengths, what.rows_of(shard), limits.batch))
        with Engine(codec, table, what, out, limits, batches) as engine:
            engine.run(missing, summary, progress)
    return summary


def begin(lengths: np.ndarray, what: shards.Run, out: Path, numbers: Sequence[int]) -> tuple[list[int], Summary]:
    """Which of these shards are missing, and the summary of a run that has done nothing yet."""
    missing = [number for number in numbers if not shards.shard_path(out, number).exists()]
    seconds = sum(int(lengths[_slice(what.rows_of(number))].sum()) for number in missing) / what.settings.sample_rate
    done = len(numbers) - len(missing)
    return missing, Summary(shards=len(numbers), finished=done, total_seconds=seconds)


class Engine:
    """Context manager that computes shards of a run; its threads and processes stay from one call to the next.

    Calls of several threads take turns: the batches of one begin as soon as none of the one before is left to begin.
    batches: how many there will be, where that is known.
    """

    def __init__(
        self, codec: Codec, table: pa.Table, what: shards.Run, out: Path, limits: Limits, batches: int = MOST_WORKERS
    ):
        self.codec, self.table, self.what, self.out, self.limits = codec, table, what, out, limits
        self.lengths = plan.lengths(table["duration"].to_numpy(), codec.sample_rate)
        self._columns = shards.schema(what.settings, shards.carried_of(table.schema))
        with ExitStack() as stack:
            self._computing = stack.enter_context(Workers(codec, batches))
            self._reading = stack.enter_context(_Readers(codec, limits.readers))  # left first: nobody waits for more
            self._streaming = stack.enter_context(_Readers(codec, self._computing.count))
            self._opened = stack.pop_all()
        self._turn = Lock()
        self._room = Semaphore(limits.readers + self._computing.count + 1)  # for batches that are read or computed

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def run(self, numbers: Sequence[int], summary: Summary, progress: Progress) -> None:
        """Compute and write the shards with these numbers."""
        for item, results in self._computed(self._work(numbers)):
            shard = item.shard
            shard.results.update(zip(item.batch.rows, results, strict=True))
            done = [result for result in results if not isinstance(result, str)]
            summary.rows, summary.errors = summary.rows + len(done), summary.errors + len(results) - len(done)
            summary.seconds += sum(samples for _, samples in done) / self.codec.sample_rate
            if len(shard.results) == shard.table.num_rows:
                _write(self.out, shard, self._columns, self.codec.sample_rate)
                summary.finished += 1
            summary.elapsed = perf_counter() - summary.started
            progress(summary)

    def _work(self, numbers: Sequence[int]) -> Iterator[_Work]:
        for number in numbers:
            rows = self.what.rows_of(number)
            shard = _Shard(number, self.table.slice(rows.start, len(rows)), rows.start)
            as_rows = manifest.rows_of(shard.table)
            for batch in plan.batches(self.lengths, rows, self.limits.batch):
                yield _Work(shard, batch, [as_rows[row - rows.start] for row in batch.rows])

    def _computed(self, work: Iterable[_Work]) -> Iterator[tuple[_Work, list[Result]]]:
        """The work with its results, in order; what comes next is read and computed meanwhile."""
        waiting: deque[tuple[_Work, Future[list[Result]]]] = deque()
        with self._turn:
            for item in work:
                self._room.acquire()
                waiting.append((item, self._begin(item)))
                while waiting and waiting[0][1].done():
                    yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()

    def _begin(self, item: _Work) -> Future[list[Result]]:
        signals = None if item.batch.long else self._reading.submit(item.rows)
        computing = self._computing.submit(self._compute, item.rows, signals)
        computing.add_done_callback(lambda _: self._room.release())
        return computing

    def _compute(self, rows: list[Row], signals: Future[list[np.ndarray | str]] | None) -> list[Result]:
        """The results of a batch; without signals, of one long row."""
        if signals is not None:
            return encoded(self.codec, signals.result(), self.limits.batch)
        with self._streaming.one() as reader:
            try:
                return [encode_long(self.codec, reader.blocks(rows[0]))]
            except InputError as error:
                return [str(error)]


class _Readers:
    """Reader processes, each used by one thread at a time."""

    def __init__(self, codec: Codec, count: int):
        self._all = [Reader(codec.sample_rate, codec.config.audio_channels) for _ in range(count)]
        self._idle: SimpleQueue[Reader] = SimpleQueue()
        for reader in self._all:
            self._idle.put(reader)
        self._pool = ThreadPoolExecutor(count)

    @contextmanager
    def one(self) -> Iterator[Reader]:
        reader = self._idle.get()
        try:
            yield reader
        finally:
            self._idle.put(reader)

    def submit(self, rows: list[Row]) -> Future[list[np.ndarray | str]]:
        """Begin to read rows as soon as a process is idle."""
        return self._pool.submit(self._read, rows)

    def _read(self, rows: list[Row]) -> list[np.ndarray | str]:
        with self.one() as reader:
            return reader.read(rows)

    def end(self) -> None:
        for reader in self._all:
            reader.end()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class Workers:
    """Context manager: threads that compute batches.

    On a CPU there are as many as PyTorch has threads, with one of PyTorch's each: they do not wait for each other, so
    that a core that has to read for a while delays no other. Elsewhere there is one.
    """

    def __init__(self, codec: Codec, batches: int):
        self._before = torch.get_num_threads()
        self.count = self.most(codec, batches)
        self._pool = ThreadPoolExecutor(self.count)
        with torch.inference_mode():  # weights are packed now, not by all threads at once
            codec.encode(torch.zeros(1, codec.config.audio_channels, codec.frame_size))
        end_workers()  # of this thread, which does not compute any more
        self.submit = self._pool.submit

    @staticmethod
    def most(codec: Codec, batches: int = MOST_WORKERS) -> int:
        """How many threads a codec gets for so many batches."""
        return max(1, min(torch.get_num_threads(), batches, MOST_WORKERS)) if codec.device.type == "cpu" else 1

    def __enter__(self) -> Workers:
        torch.set_num_threads(self._before // self.count)  # of threads that begin from now on
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)


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
