"""Compiles recorded launches for GPUs that the machine does not have, in a pool of processes; reads what came out.

Triton keeps compiled kernels in its own cache, so that only the first report is slow.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import sass
import torch
import triton
from recorded import Launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastmimi.kernels.triton import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SAVED = 64  # bytes per thread that a kernel may save on the stack outside of its loops, which takes a few clocks
MODELLED = "sm_90"  # the target whose loops are read, for cost_model.py


class Usage(NamedTuple):
    """Resources of a compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread, of which a few may be saved once, outside of loops (`_spilled`)
    shared: int  # bytes per block
    tensor_cores: str  # the tensor-core instruction, or ""
    program: sass.Loop | None = None  # its instructions, for MODELLED
    error: str = ""  # why it cannot be compiled


class Job(NamedTuple):
    """What Triton compiles a launch from, in a form that other processes can be sent."""

    module: str
    kernel: str
    args: tuple[Any, ...]  # tensors as their dtypes
    options: dict[str, Any]
    targets: tuple[str, ...] = tuple(TARGETS)


class AbsentGPU:
    """A Triton driver for a GPU that the machine does not have."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton caches compiled kernels by device

    def get_current_stream(self, device: Any) -> int:
        return 0


def compile_all(launches: Iterable[Launch], targets: list[str]) -> Iterator[dict[str, Usage]]:
    """The resources of each launch by target, in order."""
    jobs = [job_of(launch) for launch in launches]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(compile_for, targets=targets), jobs)


def job_of(launch: Launch) -> Job:
    args = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in launch.args)
    return Job(launch.kernel.fn.__module__, launch.name, args, launch.options, launch.targets or tuple(TARGETS))


def compile_for(job: Job, targets: list[str]) -> dict[str, Usage]:
    """The resources of one launch by target, of those that it is launched on."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    return {name: _compile(kernel, job, name) for name in targets if name in job.targets}


def _compile(kernel: Any, job: Job, name: str) -> Usage:
    target = TARGETS[name]
    options = _launch.for_amd(job.options) if target.backend == "hip" else job.options
    driver.set_active(AbsentGPU(target))
    try:
        compiled = kernel.warmup(*job.args, grid=(1,), **options)
    except Exception as error:  # of whatever kind: the report names the kernel and goes on
        return Usage(0, 0, 0, "", error=f"{type(error).__name__}: {str(error).strip()}"[:500])
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{n}:\s+(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        return Usage(registers, spilled * 4, shared, "v_mfma" if "v_mfma" in text else "")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    found = re.search(r"\b(HGMMA|UTCHMMA|HMMA)\b", code)
    program = sass.program(code) if name == MODELLED or stack else None
    spilled = _spilled(stack, program)
    return Usage(registers, spilled, shared, found[1] if found else "", program if name == MODELLED else None)


def _spilled(stack: int, program: sass.Loop | None) -> int:
    """Bytes per thread on the stack; 0 if they are few and no loop touches them."""
    in_loops = program is not None and any(loop.counts["local"] for loop in program.all_inner())
    return stack if in_loops or stack > SAVED else 0


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
