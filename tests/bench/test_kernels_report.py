"""Every kernel launch of the models compiles ahead of time, without a GPU: no spills, and the table is up to date."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

TRITON = Version(version("triton")) if importlib.util.find_spec("triton") is not None else Version("0")
FREE_OF_SPILLS = Version("3.6") <= TRITON < Version("3.9")
REPORT = Path(__file__).resolve().parents[2] / "bench" / "kernels_report.py"


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ptxas and cuobjdump come with Triton for Linux")
@pytest.mark.skipif(not FREE_OF_SPILLS, reason="Triton 3.4 and 3.9 spill 8 to 24 bytes in some kernels")
def test_every_launch_compiles_without_spills():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, REPORT, "sm_90"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "0 faults" in run.stdout
    table = REPORT.with_name("results") / "kernels.md"
    rows = sum(line.startswith("| ") and "_kernel |" in line for line in table.read_text().splitlines())
    assert f"{rows} kernels compiled" in run.stdout, "make kernels-report: the set of launches has changed"
