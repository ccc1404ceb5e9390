"""`make numerics`: the ops' tests with the CPU kernels that PyTorch uses on other processors, and a table of errors.

PyTorch, oneDNN and MKL choose their kernels by the processor; each setting makes them choose as on another processor.
With each setting, with one thread and with two, the tests of the ops run, and then each op of the models on several
random inputs. The table shows the largest error against fp64 divided by the bound of `testing.assert_as_exact`. Above 1
the test would fail, unless plain PyTorch's error is at least half as large.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from fastmimi.devtools.testing import relative_error
from fastmimi.devtools.workloads import distinct
from fastmimi.kernels.cpu import _native
from fastmimi.runtime import dispatch

ROOT = Path(__file__).resolve().parent.parent
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# ATen's level is lowered together with oneDNN's: otherwise its bf16 attention raises on processors with AMX.
SETTINGS = {
    "default": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", **AVX2},
    "no AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
    "MKL in compatible mode": {"MKL_CBWR": "COMPATIBLE"},
}
OPS = ("causal_conv1d", "causal_conv_transpose1d", "resblock", "window_attention", "transformer_layer")
TESTS = [f"tests/kernels/test_{name}.py" for name in (*OPS, "rvq_encode", "rvq_decode", "native", "whole_models")]
TESTS += ["tests/runtime/test_quantized.py", "tests/devtools/test_testing.py"]
ROWS = (8, 64)  # samples, frames or positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of random inputs for each op (default: 5)")
    parser.add_argument("--no-tests", action="store_true", help="only print the table")
    parser.add_argument("--measure", type=int, metavar="THREADS", help="measure in this process, print JSON")
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(options.measure)
        print(json.dumps(relative_errors(options.seeds)))
        return
    runs = [(name, threads) for name in SETTINGS for threads in (1, 2)]
    failed = [] if options.no_tests else [run for run in runs if not tests_pass(*run)]
    tables = {run: measured(*run, options.seeds) for run in runs}
    print_table(tables)
    sys.exit(f"the tests failed with {failed}" if failed else 0)


def tests_pass(setting: str, threads: int) -> bool:
    print(f"{setting}, threads: {threads}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", f"--threads={threads}", *TESTS]
    environment = {**os.environ, **SETTINGS[setting]}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def measured(setting: str, threads: int, seeds: int) -> dict[str, float]:
    """`relative_errors` in a process of its own: the libraries read their settings only once."""
    command = [sys.executable, __file__, f"--measure={threads}", f"--seeds={seeds}"]
    environment = {**os.environ, **SETTINGS[setting]}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


@torch.inference_mode()
def relative_errors(seeds: int) -> dict[str, float]:
    """{"op, dtype, implementation": the largest error divided by its bound}."""
    worst: dict[str, float] = {}
    workloads = [w for w in distinct() if w.op in OPS]
    for workload, dtype, rows, seed in product(workloads, (torch.float32, torch.bfloat16), ROWS, range(seeds)):
        tensors = workload.tensors(dtype, rows, 100 * seed)
        truth, bound = workload.exact(tensors, dtype)
        for name, candidate in implementations(workload.op, dtype):
            key = f"{workload.op}, {str(dtype)[6:]}, {name}"
            error = relative_error(workload.run(candidate, tensors), truth)
            worst[key] = max(worst.get(key, 0.0), error / (bound + torch.finfo(dtype).eps))
    return worst


def implementations(op: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """The implementations that run here: a name for the table, and the dispatcher's.

    The native kernels come once for each variant, which is active until the next one is requested.
    """
    for candidate in ("reference", "onednn"):
        if dispatch.why_not(candidate, op, dispatch.Target("cpu", dtype)) is None:
            yield candidate, candidate
    for variant in _native.variants():
        with _native.using(variant):
            yield f"cpu {variant}", "cpu"


def print_table(tables: dict[tuple[str, int], dict[str, float]]) -> None:
    rows = sorted({row for table in tables.values() for row in table})
    print("\nlargest error / bound with each setting, with one thread and with two: " + ", ".join(SETTINGS))
    for row in rows:
        found = [table.get(row) for table in tables.values()]
        print(f"{row:52}" + "".join("      -" if ratio is None else f"{ratio:7.2f}" for ratio in found))


if __name__ == "__main__":
    main()
