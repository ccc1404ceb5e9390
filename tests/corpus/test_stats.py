"""Statistics of a corpus, against plain counting, and their picture."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

import fastmimi
from fastmimi.corpus.stats import stats
from fastmimi.io import plot


def test_statistics_are_those_of_plain_counting(make_corpus) -> None:
    folder = make_corpus()
    found, records = stats(folder), list(fastmimi.read_codes(folder))
    assert (found.rows, found.shards, found.errors) == (len(records), 3, 1)
    assert found.frames == sum(record["codes"].shape[1] for record in records)
    assert found.hours == pytest.approx(sum(record["duration"] for record in records) / 3600)
    assert found.durations.tolist() == [record["duration"] for record in records]
    for level in range(6):
        counts = Counter(code for record in records for code in record["codes"][level].tolist())
        assert found.histograms[level].tolist() == [counts[entry] for entry in range(64)]
        shares = np.array([*counts.values()]) / sum(counts.values())
        assert found.usage[level].used == len(counts) / 64
        assert found.usage[level].perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_statistics_of_single_shards_and_as_json(make_corpus) -> None:
    folder = make_corpus()
    found = stats(sorted(folder.glob("shard-*.parquet"))[1:])
    assert (found.rows, found.shards, found.errors) == (5, 2, 0)
    values = json.loads(stats(folder).to_json())
    assert values["rows"] == 8 and values["errors"] == 1 and values["model"] == "small"
    assert [level["level"] for level in values["usage"]] == [1, 2, 3, 4, 5, 6] and "histograms" not in values


def test_the_picture(make_corpus, tmp_path) -> None:
    found = stats(make_corpus())
    used, perplexity = [level.used for level in found.usage], [level.perplexity for level in found.usage]
    plot.draw_usage(tmp_path / "a.svg", used, perplexity, found.durations, "svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
