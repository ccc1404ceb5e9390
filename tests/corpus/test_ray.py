"""The Ray Data engine gives what the local engine gives, on one node and on several, and after actors were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import fastmimi
from fastmimi import InputError
from fastmimi.corpus import shards
from fastmimi.corpus.ray import Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def tables(folder: Path) -> list[Any]:
    return [pq.read_table(path) for path in [*shards.shard_files(folder), folder / shards.ERRORS]]


def tokenized(speech: Path, out: Path, model: Path, engine: Ray | None = None) -> Any:
    return fastmimi.tokenize(speech, out, model=model, rows_per_shard=3, progress=False, engine=engine)


def test_row_for_row(cluster: Any, speech: Path, tmp_path: Path, model: Path) -> None:
    here = tokenized(speech, tmp_path / "local", model)
    there = tokenized(speech, tmp_path / "ray", model, Ray())
    assert tables(tmp_path / "ray") == tables(tmp_path / "local")
    assert (there.rows, there.errors, there.seconds, there.finished) == (
        here.rows, here.errors, pytest.approx(here.seconds), here.finished,
    )  # fmt: skip
    again = tokenized(speech, tmp_path / "ray", model, Ray())
    assert (again.rows, again.finished) == (0, here.finished)


def test_goes_on_where_the_local_engine_was_stopped(cluster: Any, speech: Path, tmp_path: Path, model: Path) -> None:
    tokenized(speech, tmp_path / "local", model)
    tokenized(speech, tmp_path / "ray", model)
    for path in shards.shard_files(tmp_path / "ray")[1::2]:
        path.unlink()
    done = tokenized(speech, tmp_path / "ray", model, Ray(actors=1))
    assert 0 < done.rows < 12
    assert tables(tmp_path / "ray") == tables(tmp_path / "local")


def test_killed_actors(cluster: Any, speech: Path, tmp_path: Path, model: Path) -> None:
    tokenized(speech, tmp_path / "local", model)
    stop, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not stop.wait(0.05):
            found = subprocess.run(["pgrep", "-f", r"^ray::.*_Shards"], capture_output=True, text=True, check=False)
            if len(killed) < 2 and found.stdout:
                time.sleep(0.3)
                killed.append(int(found.stdout.split()[0]))
                os.kill(killed[-1], signal.SIGKILL)
                time.sleep(2)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        tokenized(speech, tmp_path / "ray", model, Ray())
    finally:
        stop.set()
        thread.join()
    assert killed
    assert tables(tmp_path / "ray") == tables(tmp_path / "local")


@pytest.mark.parametrize(
    ("engine", "nodes", "actors", "cpus"),
    [
        (Ray(), [{"CPU": 2}], 1, 2),
        (Ray(), [{"CPU": 1}, {"CPU": 1}], 2, 1),
        (Ray(), [{"CPU": 4}, {"CPU": 64}, {"memory": 1e9}], 17, 4),
        (Ray(cpus=1), [{"CPU": 2}], 2, 1),
        (Ray(cpus=2), [{"CPU": 3}, {"CPU": 3}], 2, 2),  # a third one would fit on no node
        (Ray(actors=3), [{"CPU": 8}], 3, 2),
        (Ray(actors=2), [{"CPU": 8}, {"CPU": 8}], 2, 8),
        (Ray(gpus=0.5), [{"CPU": 16, "GPU": 1}, {"CPU": 8}], 2, 8),
        (Ray(gpus=1), [{"CPU": 2, "GPU": 4}], 2, 1),
        (Ray(gpus=1, cpus=4), [{"CPU": 32, "GPU": 2}], 2, 4),
    ],
)  # fmt: skip
def test_actors_of_nodes(engine: Ray, nodes: list[dict[str, float]], actors: int, cpus: int) -> None:
    assert engine._fitting(nodes) == (actors, cpus)


@pytest.mark.parametrize(
    ("engine", "nodes"), [(Ray(gpus=1), [{"CPU": 8}]), (Ray(cpus=4), [{"CPU": 2}, {"CPU": 3}]), (Ray(), [])]
)
def test_no_node_is_large_enough(engine: Ray, nodes: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match=r"^the nodes have \[.*\], an actor needs \d CPUs and \d GPUs$"):
        engine._fitting(nodes)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Ray(actors=0), "actors must be a positive integer, got 0"),
        (Ray(cpus=1.5), "cpus must be a positive integer, got 1.5"),  # type: ignore[arg-type]
        (Ray(gpus=-1), "gpus must be a number of at least 0, got -1"),
    ],
)
def test_wrong_settings(engine: Ray, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmimi.corpus.ray.find_spec", lambda name: name)
    with pytest.raises(InputError, match=message):
        engine.check("demo")


def test_a_loaded_model_cannot_be_sent(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmimi.corpus.ray.find_spec", lambda name: name)
    with pytest.raises(InputError, match="pass its name or folder"):
        Ray().check(codec)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmimi.corpus.ray.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fastmimi\[ray\]'"):
        Ray().check("demo")
