"""Tests of the benchmarks: every op has a workload, and timing one-time work fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmimi.devtools.workloads import WORKLOADS
from fastmimi.runtime.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = """
import torch
from fastmimi.runtime import packing

def bench_packing(benchmark):
    weight = torch.ones(3)
    benchmark.pedantic(lambda: packing.packed({weight}, "layout", torch.clone), rounds=3, warmup_rounds={warm})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight, warm, fails",
    [("weight", 1, False), ("weight", 0, True), ("weight + 1", 1, True)],
    ids=["kept", "cold", "new"],
)
def test_a_benchmark_that_packs_in_its_timed_rounds_fails(tmp_path, weight, warm, fails):
    path = tmp_path / "bench_packing.py"
    path.write_text(BENCHMARK.format(weight=weight, warm=warm))
    shutil.copy(ROOT / "bench" / "conftest.py", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(path),
        "-q",
        "--benchmark-enable",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    # Without the variables of pytest-xdist: in its workers, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    reported = "timed rounds packed weights or recorded steps" in done.stdout
    assert (done.returncode, reported) == ((1, True) if fails else (0, False)), done.stdout + done.stderr


def test_every_op_has_a_workload():
    assert {workload.op for workload in WORKLOADS} == set(OPS)
