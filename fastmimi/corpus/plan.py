"""A manifest -> shards -> batches: which rows are computed together. It depends on lengths and limits alone.

A batch has rows of about equal length, since its cost is that of its longest row times their number. Which rows share a
batch changes no code, so that a run may go on with other limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, shown

UNKNOWN_SECONDS = 15.0  # what a row of unknown duration is taken for
MOST_ROWS = 256
LEAST_FILLED = 0.95  # of a batch's samples that are audio, not padding: on a CPU a row alone costs little more


@dataclass(frozen=True)
class Batch:
    """Rows of a manifest, by number, that are computed together; `long`: one row, read and computed in tiles."""

    rows: tuple[int, ...]
    samples: int  # of the longest, at the codec's rate, as the manifest has it
    long: bool = False

    @property
    def cost(self) -> int:
        """Samples with padding."""
        return self.samples * len(self.rows)


@dataclass(frozen=True)
class Part:
    """Of an array of jobs, the one that does each `count`-th shard beginning with `index`, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of "3/64": the fourth of 64 jobs. Raises InputError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
            raise InputError(f"shard must be i/n, with i from 0 to n - 1, such as 0/4, got {shown(text)}")
        if not int(index) < int(count):
            raise InputError(f"shard must be i/n, with i from 0 to n - 1, got {text}")
        return cls(int(index), int(count))

    def of(self, shards: int) -> range:
        """The numbers of this job's shards."""
        return range(self.index, shards, self.count)


def lengths(durations: np.ndarray, sample_rate: int) -> np.ndarray:
    """Samples at the codec's rate, int64, of durations in seconds, which are NaN where not known."""
    known = np.where(np.isfinite(durations) & (durations > 0), durations, UNKNOWN_SECONDS)
    return np.ceil(np.minimum(known, 1e9) * sample_rate).astype(np.int64)


def batches(lengths: np.ndarray, rows: range, budget: int) -> Iterator[Batch]:
    """The batches of a shard, the longest rows first, each of at most `budget` samples with padding.

    lengths: of all rows of the manifest; rows: which of them are in the shard. A row of more than `budget` samples is
    a batch of its own. At least `LEAST_FILLED` of a batch is audio.
    """
    inside = lengths[rows.start : rows.stop]
    order = np.argsort(-inside, kind="stable")
    start = 0
    while start < len(order):
        longest = int(inside[order[start]])
        most = max(1, min(budget // max(1, longest), MOST_ROWS))
        together = np.cumsum(inside[order[start : start + most]])
        filled = together >= LEAST_FILLED * longest * np.arange(1, len(together) + 1)  # only the first ones
        count = int(filled.sum())
        some = tuple((order[start : start + count] + rows.start).tolist())
        yield Batch(some, longest, long=longest > budget)
        start += count
