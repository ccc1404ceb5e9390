"""Steps of streams as CUDA graphs: one launch by the host in place of one per kernel.

`Codec.warm_up(state)` captures the step of that state for one direction, batch and number of frames. A graph reads and
writes the state's own buffers, at their addresses, so it is of this state alone and dropped with it. It is kept only if
its first replays equal the model's own step bit for bit, output and state, and is discarded when a weight, a module or
the choice of kernels changes. Weights are packed before the capture, so a replay packs nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import packing
from .cpu_graphs import Step
from .ops import Ops
from .state import DirectionState
from .watch import Model, Watch

_log = logging.getLogger(__name__)

Key = tuple[object, ...]


@dataclass(frozen=True)
class GraphReport:
    """A row of `graph_report`: what was captured, the memory that it holds, and how long capturing took."""

    direction: str
    step: str
    input: tuple[int, ...]
    nbytes: int
    seconds: float


class Graph(Protocol):
    """A function that was captured without being run; each replay runs it on the same memory."""

    nbytes: int

    def __init__(self, device: torch.device, pool: Any): ...

    def capture(self, function: Callable[[], list[Tensor]]) -> list[Tensor]: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A `torch.cuda.CUDAGraph`. Graphs that never run at the same time may share a pool of memory."""

    def __init__(self, device: torch.device, pool: Any):
        self.graph, self.device, self.pool, self.nbytes = torch.cuda.CUDAGraph(), device, pool, 0

    def capture(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.cuda.device(self.device):
            before = torch.cuda.memory_reserved(self.device)
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.graph(self.graph, self.pool, stream, capture_error_mode="thread_local"):
                results = function()
            self.nbytes = torch.cuda.memory_reserved(self.device) - before
        return results

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


class _Step:
    """A captured step: its input, its results, and where the state was that it reads and writes.

    Of a pool it runs any rows, as many as were captured: their numbers are an input too.
    """

    def __init__(self, graph: Graph, step: Step, x: Tensor, state: DirectionState):
        self.graph, self.input, self.addresses = graph, x.clone(), _addresses(state)
        self.rows = None if state.rows is None else state.rows.clone()
        if state.pool is not None and self.rows is not None:
            state = state.pool.select(self.rows)
        self.results = graph.capture(lambda: step(self.input, state))
        self.report: GraphReport | None = None

    def run(self, x: Tensor, rows: Tensor | None) -> list[Tensor]:
        self.input.copy_(x)
        if self.rows is not None and rows is not None:
            self.rows.copy_(rows)
        self.graph.replay()
        return [result.clone() for result in self.results]  # the next replay overwrites them


class CudaGraphs:
    """The captured steps of one direction of a model. A copied or unpickled one is empty."""

    def __init__(self, direction: str, graph: type[Graph] = CudaGraph):
        self.direction, self.graph = direction, graph
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their references to weights."""
        self._steps: WeakKeyDictionary[DirectionState, dict[Key, _Step]] = WeakKeyDictionary()
        self._watch = Watch()

    @property
    def report(self) -> list[GraphReport]:
        """A row for each graph that there is, in the order of capture for each state."""
        kept = [step.report for steps in self._steps.values() for step in steps.values()]
        return [row for row in kept if row is not None]

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[str, type[Graph]]]:
        return CudaGraphs, (self.direction, self.graph)

    def run(self, ops: Ops, x: Tensor, state: DirectionState, kind: int | str) -> list[Tensor] | None:
        """The result of a codec's step on x by a graph, or None if there is none: then nothing has changed.

        kind: distinguishes the steps of this direction that take inputs of the same shape.
        """
        if not self._steps or torch.compiler.is_compiling():
            return None
        step = self._steps.get(_owner(state), {}).get(_key(ops, x, state, kind))
        if step is None or step.addresses != _addresses(state):
            return None
        if packing.is_capturing(x.device):  # by the user: a capture cannot contain a replay
            return None
        if not self._watch.is_current():
            self.forget()
            return None
        return None if self._watch.has_hooks() else step.run(x, state.rows)

    def record(
        self, model: Model, ops: Ops, step: Step, examples: list[Tensor], state: DirectionState, threads: int,
        kind: int | str,
    ) -> None:  # fmt: skip
        """Capture step(x, state), which leaves the state as it is; threads may not share a state, so one graph will do.

        examples: three different inputs of the step, which the graph is compared with the model's own step on.
        """
        if not (self._watch.tensors and self._watch.is_current()):
            self.forget()
            self._watch = Watch(model, self.direction)
        steps, key = self._steps.setdefault(_owner(state), {}), _key(ops, examples[0], state, kind)
        start = time.perf_counter()
        if key in steps and steps[key].addresses == _addresses(state):
            return
        packing.count_preparation()
        with torch.inference_mode(False), torch.no_grad():
            before, theirs = state.clone(), state.clone()
            step(examples[0], state.clone())  # packs weights and builds kernels
            pool = next(iter(steps.values())).graph if steps else None
            captured = _Step(self.graph(state.offset.device, _pool_of(pool)), step, examples[0], state)
            state.copy_(before)  # for graphs that run what they capture
            pairs = [(captured.run(x, state.rows), step(x, theirs)) for x in examples]
            equal = all(torch.equal(*pair) for mine, truth in pairs for pair in zip(mine, truth, strict=True))
            equal = equal and all(map(torch.equal, state.clone().tensors(), theirs.tensors()))
            state.copy_(before)
        if not equal:
            _log.warning("a CUDA graph differs from the model's own step and is not used: %s, %s", self.direction, kind)
            return
        captured.report = GraphReport(
            self.direction, str(kind), tuple(examples[0].shape), captured.graph.nbytes, time.perf_counter() - start
        )
        steps[key] = captured
        _log.debug("captured %s", captured.report)


def _pool_of(graph: Graph | None) -> Any:
    """The memory pool of another graph of the same state, which never runs at the same time; None: a new one."""
    return graph.graph.pool() if isinstance(graph, CudaGraph) else None


def _owner(state: DirectionState) -> DirectionState:
    """The state that graphs are kept by: selected rows are made anew for each step."""
    return state if state.pool is None else state.pool


def _key(ops: Ops, x: Tensor, state: DirectionState, kind: int | str) -> Key:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (kind, ops, x.shape, x.dtype, state.rows is None, autocast)


def _addresses(state: DirectionState) -> list[int]:
    return [tensor.data_ptr() for tensor in state.tensors()]
