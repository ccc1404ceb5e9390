"""Checks and measurements on a GPU, in three commands that each end within their budget.

    python bench/gpu.py correct     # every launch, every workload and whole models against fp64 and the CPU
    python bench/gpu.py models      # whole codecs, offline and in streams, beside transformers and moshi
    python bench/gpu.py ops         # each op, beside cuDNN, SDPA, FlexAttention, torch.compile and transformers

    --dry           without a GPU: small shapes in Triton's interpreter, the same code; measures nothing
    --out PATH      a folder, or the JSON file itself; by default bench/results
    --budget S      seconds after which nothing new is started; what is left is listed as skipped
    --only TEXT     only the steps whose names contain this

It runs from any folder; the package need not be installed, only its dependencies. Kernels are first compiled in several
processes. The JSON file is replaced after every row, so a run that is killed leaves what it had. What fails becomes a
row, and the rest runs. The exit code is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

COLUMNS = {  # of the table that is printed at the end
    "correct": "step op check phase of at error bound differing error_text error_in_worker",
    "models": "way case dtype who warm_up wall_ms wall_ms_p50 wall_ms_p99 gpu_ms times_real_time graphs "
    "warm_up_failed launches synchronisations kernels_ms resident_mib peak_mib state_bytes_per_stream "
    "measured error_text",
    "ops": "op case dtype who pass calls ms ms_of_pass of_roofline binds timed_by measured error_text",
}
DRY_BUDGET_S = 150.0
BUDGETS_S = {"correct": 200.0, "models": 280.0, "ops": 220.0}


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage, add_help=True)
    parser.add_argument("command", choices=BUDGETS_S)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, metavar="PATH")
    parser.add_argument("--budget", type=float, metavar="S")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, here and in other processes
    return run(given)


def run(given: argparse.Namespace) -> int:
    import gpu_report
    import torch

    if given.dry:
        from fastmimi.devtools.testing import patch_triton_interpreter

        patch_triton_interpreter()
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("no GPU found: --dry runs the same without one, and measures nothing", file=sys.stderr)
        return 2
    from gpu_timing import DryTimer, Timer, quiet

    usual = DRY_BUDGET_S if given.dry else BUDGETS_S[given.command]
    budget = usual if given.budget is None else given.budget
    make = gpu_report.Report.resume if given.resume else gpu_report.Report
    report = make(path_of(given), given.command, given.dry, budget)
    timer = DryTimer() if given.dry else Timer()
    if given.command == "correct":
        import gpu_correct

        steps = gpu_correct.steps(report, given.dry)
    elif given.command == "models":
        import gpu_models

        steps = gpu_models.steps(timer, given.dry)
    else:
        import gpu_ops

        steps = gpu_ops.steps(report, timer, given.dry)
    with quiet():
        failed = report.run(steps, given.only)
    if not (report.rows or report.content["skipped"]):
        print(f"--only {given.only!r} matches no step", file=sys.stderr)
        return 1
    shown = report.failures if given.command == "correct" else [row for row in report.rows if "who" in row]
    if shown:
        print(gpu_report.table(shown, COLUMNS[given.command].split()))
    print(f"{len(report.rows)} rows, {failed} failed, {len(report.content['skipped'])} steps skipped: {report.path}")
    return min(1, failed)


def path_of(given: argparse.Namespace) -> Path:
    """The file to write: `--out` itself if it ends in .json, else gpu-<command>.json in that folder."""
    from gpu_report import RESULTS

    out = given.out or RESULTS
    return out if out.suffix == ".json" else out / f"gpu-{'dry-' if given.dry else ''}{given.command}.json"


if __name__ == "__main__":
    sys.exit(main())
