"""bench/gpu.py --dry needs nothing but its imports: it runs from another folder, without git, not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmimi.runtime import dispatch
from fastmimi.runtime.ops import OPS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"


@pytest.mark.kernels
def test_a_dry_run_of_each_op(tmp_path):
    """One small case of every op that Triton has a kernel for."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        environment.pop(name, None)
    cases = {
        "causal_conv1d": "last, 64 to 1", "causal_conv_transpose1d": "depthwise", "resblock": "64 channels at",
        "window_attention": "250 positions, ", "rvq_encode": "7 levels", "rvq_decode": "31 levels",
        "transformer_layer": "2 positions of 512",
    }  # fmt: skip
    assert cases.keys() == {op for op in OPS if not dispatch.is_absent(op, "triton")}
    for op, case in cases.items():
        command = [sys.executable, SCRIPT, "--dry", "--only", case]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"| {op} " in done.stdout and "| equal |" in done.stdout


def test_the_commit_is_unknown_without_git(tmp_path):
    code = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['commit']())"
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "unknown\n", done.stderr


def test_a_name_that_matches_nothing_is_an_error(tmp_path):
    command = [sys.executable, SCRIPT, "--dry", "--only", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "--only 'nothing' matches no op" in done.stderr
