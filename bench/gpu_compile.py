"""Compiles kernels in several processes before anything is timed: Triton's and Inductor's caches on disk share them.

A job is a function with arguments that runs something once on the GPU. A process that dies takes only its current job
with it; jobs that are left when the time is up compile later, where they are needed first.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_calls import OpCall
from gpu_report import Row, free_memory, text_of
from gpu_timing import quiet

from fastmimi.devtools.workloads import WORKLOADS, Workload
from fastmimi.runtime import dispatch

LARGEST_BYTES = 600 << 20  # of the arguments of a call, with which all processes together fit on a GPU
PROCESSES = 16


class Job(NamedTuple):
    """One thing to compile."""

    name: str
    run: Callable[..., object]
    arguments: tuple[Any, ...]


def run_call(call: OpCall, device: str) -> None:
    """One launch of each kernel of a call, on random tensors."""
    call.run(dispatch.implementation(call.op, "triton"), call.make(device))


def run_workload(index: int, dtype: torch.dtype, rows: int, device: str) -> None:
    with torch.device(device):
        tensors = WORKLOADS[index].tensors(dtype, rows)
    WORKLOADS[index].run("triton", tensors)


def workload_job(workload: Workload, dtype: torch.dtype, rows: int, device: str) -> Job:
    arguments = (WORKLOADS.index(workload), dtype, rows, device)
    return Job(f"{workload.op}: {workload.name}, {str(dtype)[6:]}", run_workload, arguments)


def jobs_of(calls: list[OpCall], device: str) -> list[Job]:
    """A job for each call that Triton has kernels for and whose tensors are not too large for all to run at once.

    Neighbours often launch the same kernels, which two processes should not compile at the same time.
    """
    chosen = [c for c in calls if not dispatch.is_absent(c.op, "triton") and c.bytes <= LARGEST_BYTES]
    random.Random(0).shuffle(chosen)
    return [Job(f"{c.op} {c}", run_call, (c, device)) for c in chosen]


def compiled(jobs: list[Job], dry: bool, limit_s: float = 120.0) -> Iterator[Row]:
    """Run the jobs in processes; a row for each failure, and one that counts."""
    start, failed, finished = time.monotonic(), 0, 0
    free_memory()
    context = multiprocessing.get_context("spawn")
    following, outcomes = context.Value("i", 0), context.Queue()
    count = max(1, min(PROCESSES, os.cpu_count() or 1, len(jobs)))
    workers = [context.Process(target=_work, args=(jobs, following, outcomes, dry), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    while finished < len(jobs) and time.monotonic() - start < limit_s:
        try:
            name, error = outcomes.get(timeout=0.2)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        finished += 1
        if error is not None and "out of memory" not in error:  # alone, it has more
            failed += 1
            # not `error_text`: an error of another process's CUDA context does not end this one
            yield {"check": f"compile {name}", "ok": False, "error_in_worker": error}
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(5)
    row = {"check": "compile", "ok": not failed, "processes": count}
    row |= {"jobs": len(jobs), "compiled": finished - failed, "failed": failed, "left": len(jobs) - finished}
    yield row if dry else row | {"seconds": round(time.monotonic() - start, 1)}


def _work(jobs: list[Job], following: Any, outcomes: Any, dry: bool) -> None:
    """Take jobs one after another until none is left."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes are its threads
    torch.set_num_threads(1)
    if dry:
        from fastmimi.devtools.testing import patch_triton_interpreter

        patch_triton_interpreter()
    while True:
        with following.get_lock():
            index = following.value
            following.value += 1
        if index >= len(jobs):
            return
        job, error = jobs[index], None
        try:
            with quiet(), torch.no_grad():
                job.run(*job.arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as problem:  # the other jobs compile
            error = text_of(problem)
        outcomes.put((job.name, error))
