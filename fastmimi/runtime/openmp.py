"""OpenMP's worker threads, of which each thread that computes on a CPU has its own.

libgomp counts those of all threads. Where there are more than processors, a worker that waits for the others sleeps at
once instead of spinning, and each parallel region, of which a streamed frame has over a hundred, begins with waking it.
So a thread that has computed, and leaves computing to another, should end its own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

PARALLEL_FROM = 32_768  # elements from which PyTorch's elementwise operations use several threads
SOFT = 1  # omp_pause_soft: settings stay (OpenMP 5.0, section 3.2.44)


def end_workers() -> None:
    """End the calling thread's workers; its next parallel region starts new ones. Outside of parallel regions only."""
    if (pause := _pause()) is not None:
        pause(SOFT)


@cache
def _pause() -> Any:
    """The function of the OpenMP library that PyTorch has loaded; None if it has none, or an older one."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return None
