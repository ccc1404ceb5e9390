"""Shared by the benchmarks: alternating rounds, a check for one-time work in timed rounds, and the table of ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peers
import pytest

import fastmimi
from fastmimi.runtime import packing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights, which all peers load."""
    return peers.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def mimi(folder):
    return fastmimi.load(folder, num_codebooks=peers.CODEBOOKS)


@pytest.fixture
def benchmark(benchmark, monkeypatch):
    """pytest-benchmark's fixture; fails if a timed round packs weights or records a step, both one-time work."""
    prepared: list[int] = []
    pedantic = benchmark.pedantic

    def steady(target, *arguments, **options):
        def counted(*given, **named):
            before = packing.preparations()
            result = target(*given, **named)
            prepared.append(packing.preparations() - before)
            return result

        result = pedantic(counted, *arguments, **options)
        timed = prepared[-options["rounds"] :] if benchmark.enabled else []
        assert not any(timed), f"timed rounds packed weights or recorded steps; times in each round: {timed}"
        return result

    monkeypatch.setattr(benchmark, "pedantic", steady)
    return benchmark


@pytest.fixture
def record(benchmark) -> Callable[[dict[str, list[float]]], None]:
    """A function that stores medians and ratios to ours in `extra_info`, from the seconds of each round by name."""

    def run(times: dict[str, list[float]]) -> None:
        if benchmark.stats is None:  # --benchmark-disable
            return
        mine = benchmark.stats.stats.median
        benchmark.extra_info["seconds"] = {name: median(taken) for name, taken in times.items()}
        benchmark.extra_info["ratios"] = {name: t / mine for name, t in benchmark.extra_info["seconds"].items()}

    return run


@pytest.fixture
def in_turn(benchmark, record) -> Callable[..., dict[str, Any]]:
    """A function that times several calls in alternation and returns their results.

    pytest-benchmark times the call `ours`; all others are timed once before each of its rounds, each followed by a
    pause of `pause` seconds.
    """

    def run(
        group: str, calls: dict[str, Callable[[], Any]], rounds: int, ours: str = "fastmimi", pause: float = 0.0
    ) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in calls if name != ours}
        results = {}

        def others() -> None:
            for name, taken in times.items():
                start = time.perf_counter()
                results[name] = calls[name]()
                taken.append(time.perf_counter() - start)
                time.sleep(pause)

        benchmark.group = group
        results[ours] = benchmark.pedantic(calls[ours], setup=others, rounds=rounds)
        record(times)
        return results

    return run


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the ratios to the others, for which the table of pytest-benchmark has no column."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info.get("ratios")]
    if rows:
        terminalreporter.section("times of the others as multiples of ours, in alternating rounds")
    for bench in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in bench.extra_info["ratios"].items())
        seconds = bench.extra_info.get("own", bench.stats.median)
        terminalreporter.write_line(f"{bench.group:72} {seconds * 1e3:10.3f} ms   {ratios}")
