"""Plans: every row once, budgets kept, the same for the same lengths; shards of a job."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmimi.corpus import plan
from fastmimi.errors import InputError

LENGTHS = st.lists(st.integers(0, 5000), max_size=300)


@given(LENGTHS, st.integers(1, 6000), st.data())
def test_each_row_is_in_one_batch_within_the_budget(lengths: list[int], budget: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(lengths)))
    rows = range(start, data.draw(st.integers(start, len(lengths))))
    batches = [*plan.batches(np.array(lengths, np.int64), rows, budget)]
    assert sorted(row for batch in batches for row in batch.rows) == [*rows]
    for batch in batches:
        assert batch.samples == max(lengths[row] for row in batch.rows)
        assert batch.long == (batch.samples > budget)
        assert batch.cost <= budget if not batch.long else len(batch.rows) == 1
        assert len(batch.rows) <= plan.MOST_ROWS
        assert sum(lengths[row] for row in batch.rows) >= plan.LEAST_FILLED * batch.cost
    assert [batch.samples for batch in batches] == sorted((batch.samples for batch in batches), reverse=True)
    assert batches == [*plan.batches(np.array(lengths, np.int64), rows, budget)]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(5000, 20_000))
def test_batches_are_not_smaller_than_they_need_to_be(lengths: list[int], budget: int) -> None:
    batches = [*plan.batches(np.array(lengths), range(len(lengths)), budget)]
    for batch, after in pairwise(batches):
        count, audio = len(batch.rows) + 1, sum(lengths[row] for row in batch.rows) + after.samples
        too_large = batch.samples * count > budget or count > plan.MOST_ROWS
        assert too_large or audio < plan.LEAST_FILLED * batch.samples * count


def test_lengths_of_unknown_and_absurd_durations() -> None:
    found = plan.lengths(np.array([1.00001, np.nan, -1.0, 0.0, np.inf, 1e300]), 24_000)
    unknown = int(plan.UNKNOWN_SECONDS * 24_000)
    assert found.tolist() == [24_001, unknown, unknown, unknown, unknown, int(1e9) * 24_000]


@given(st.integers(1, 20), st.integers(0, 100))
def test_the_jobs_of_an_array_share_the_shards(count: int, shards: int) -> None:
    parts = [plan.Part.parse(f"{i}/{count}").of(shards) for i in range(count)]
    assert sorted(shard for part in parts for shard in part) == [*range(shards)]


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "-1/2", "0/0", "1/2/3", "a/b", "0.5/2", "²/3"])
def test_parts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="shard must be i/n"):
        plan.Part.parse(text)
