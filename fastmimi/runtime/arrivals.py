"""Arrival counters: how the programs of a GPU kernel find out which of them comes last.

Counters are zero between launches: the last program to arrive resets its own. Launches that run one after another may
share them. Those of a streaming state are its own, so that its steps may run on any CUDA stream, and in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor

SPARE = 4096  # counters beyond one for each row of a batch: for the parts of results
_of_thread = local()
_of_streams: dict[tuple[torch.device, int], Tensor] = {}


def new(batch: int, device: torch.device) -> Tensor:
    """Counters for steps of so many streams."""
    return torch.zeros(batch + SPARE, dtype=torch.int32, device=device)


@contextmanager
def owned(counters: Tensor) -> Iterator[None]:
    """Within the context, the launches of this thread on the counters' device use these."""
    before = getattr(_of_thread, "counters", None)
    _of_thread.counters = counters
    try:
        yield
    finally:
        _of_thread.counters = before


def arrivals(x: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros on the device of x: those of the state, or of the current CUDA stream."""
    mine: Tensor | None = getattr(_of_thread, "counters", None)
    if mine is not None and mine.device == x.device and len(mine) >= count:
        return mine
    if not x.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device):
        if torch.cuda.is_current_stream_capturing():  # it may be replayed beside other launches
            return torch.zeros(count, dtype=torch.int32, device=x.device)
        key = (x.device, torch.cuda.current_stream().cuda_stream)
    if key not in _of_streams or len(_of_streams[key]) < count:
        _of_streams[key] = torch.zeros(max(count, SPARE), dtype=torch.int32, device=x.device)
    return _of_streams[key]
