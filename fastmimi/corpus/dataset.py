"""A tokenised corpus as a torch Dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import InputError
from .codes import CodesTable, Record, Source


class CodesDataset(Dataset[Record]):
    """The utterances of a tokenised corpus: item i is a dictionary of `id`, `codes` (int64 [K, T]) and other columns.

    Row groups are read when one of their items is asked for, and the last ones are kept: `cached_groups` per process.
    It can be pickled, so a DataLoader can have workers; `CodesDataset.collate` pads a batch.

    Args:
        source: the output folder of `fastmimi tokenize`, one shard, or several shards.
        num_codebooks: read only the first codebooks; by default all.
        columns: further columns to read beside `id` and `codes`; by default all.
        cached_groups: row groups to keep, at least 1.

    Raises InputError for an invalid source or argument, and IndexError for an item that is not there.
    """

    def __init__(
        self, source: Source, *, num_codebooks: int | None = None, columns: Sequence[str] | None = None,
        cached_groups: int = 4,
    ):  # fmt: skip
        if cached_groups < 1:
            raise InputError(f"cached_groups must be positive, got {cached_groups}")
        self.table = CodesTable(source)
        self.columns = self.table.selected(columns)
        self.num_codebooks = self.table.codebooks(num_codebooks)
        self.cached_groups = cached_groups
        self._ends = [*accumulate(group.rows for group in self.table.groups)]
        self._cache: OrderedDict[int, list[Record]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} utterances")
        number = bisect_right(self._ends, at)
        first = self._ends[number] - self.table.groups[number].rows
        record = self._group(number)[at - first]
        return {**record, "codes": torch.from_numpy(record["codes"].astype(np.int64))}

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """The items of a batch; each row group is read once, however its items are spread over the batch."""
        order = sorted(range(len(indices)), key=lambda i: indices[i])
        found = {i: self[indices[i]] for i in order}
        return [found[i] for i in range(len(indices))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _group(self, number: int) -> list[Record]:
        if number not in self._cache:
            group = self.table.groups[number]
            self._cache[number] = self.table.records(group, self.columns, self.num_codebooks)
        self._cache.move_to_end(number)
        while len(self._cache) > self.cached_groups:
            self._cache.popitem(last=False)
        return self._cache[number]

    @staticmethod
    def collate(batch: Sequence[Record]) -> dict[str, Any]:
        """Records -> `codes` [B, K, T] padded with -1, `lengths` [B] in frames, and lists of the other columns."""
        codes = [record["codes"] for record in batch]
        lengths = torch.tensor([item.shape[1] for item in codes])
        padded = torch.full((len(batch), codes[0].shape[0], int(lengths.max())), -1, dtype=torch.int64)
        for row, item in zip(padded, codes, strict=True):
            row[:, : item.shape[1]] = item
        others = {name: [record[name] for record in batch] for name in batch[0] if name != "codes"}
        return {**others, "codes": padded, "lengths": lengths}
