"""A stand-in for a CUDA graph, which records PyTorch's operations and replays them on the CPU; for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """Like a CUDA graph, it replays on the memory of the capture. Unlike one, it also runs what it captures."""

    nbytes = 12345
    replays = 0  # of all graphs

    def __init__(self, device: torch.device, pool: Any):
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def capture(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        with _Recorder() as recorder:
            results = function()
        self.calls = recorder.calls
        return results

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
