"""Recorded steps of streams, the CPU's counterpart of CUDA graphs: without them a third of a frame is Python overhead.

`Codec.warm_up` records the native calls of one step as a program, which later steps of the same shape run in place of
the model. A program is kept only if its results and state equal the model's bit for bit for two steps in a row, and is
dropped when a weight, a module or the choice of kernels changes. A program takes the stream's state as an argument, so
one program serves all streams of a batch size; threads that step at the same time need one program each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from . import dispatch, packing
from .ops import Ops
from .state import DirectionState
from .watch import Model, Watch

_log = logging.getLogger(__name__)

MOST_FRAMES = 4  # that a recorded step may have: in longer ones Python's overhead is small

Step = Callable[[Tensor, DirectionState], list[Tensor]]
Key = tuple[object, ...]


class Program(Protocol):
    """A recorded step (kernels/cpu/_program.py)."""

    def run(self, x: Tensor, state: list[Tensor]) -> list[Tensor]: ...


class _Scratch(DirectionState):
    """A state to record with: `first` has a fixed address, and `positions` is what the step advanced by."""

    def __init__(self, state: DirectionState):
        copy = state.clone()
        super().__init__(copy.buffers, copy.offset, copy.active, copy.rows, copy.pool)
        self.start = state.first.clone()
        self.positions = 0

    @property
    def first(self) -> Tensor:
        return self.start

    def advance(self, positions: int) -> None:
        self.positions = positions


def _tensors(state: DirectionState) -> list[Tensor]:
    named = [] if state.rows is None else [state.rows]
    return [*state.tensors(), state.first, *named]


class CpuGraphs:
    """The programs of one direction of a model. A copied or unpickled one is empty."""

    def __init__(self, direction: str) -> None:
        self.direction = direction
        self.forget()

    def forget(self) -> None:
        """Drop all programs and their references to weights."""
        self._count: dict[Key, int] = {}  # programs of a step, idle or running
        self._idle: dict[Key, list[tuple[Program, int]]] = {}  # programs that no thread is running, and their positions
        self._watch = Watch()

    def __reduce__(self) -> tuple[type[CpuGraphs], tuple[str]]:
        return CpuGraphs, (self.direction,)

    def run(self, ops: Ops, x: Tensor, state: DirectionState, kind: int | str) -> list[Tensor] | None:
        """The result of a codec's step on x by a recorded program, or None if there is none: then nothing has changed.

        kind: distinguishes the steps of this direction that take inputs of the same shape.
        """
        if not self._idle or torch.compiler.is_compiling():
            return None
        idle = self._idle.get(_key(ops, x, state, kind))
        if not idle:
            return None
        if not self._watch.is_current():
            self.forget()
            return None
        if self._watch.has_hooks():
            return None
        try:
            program, positions = idle.pop()
        except IndexError:  # another thread has just taken it
            return None
        y = program.run(x, _tensors(state))
        idle.append((program, positions))
        state.advance(positions)
        return y

    def record(
        self, model: Model, ops: Ops, step: Step, examples: list[Tensor], state: DirectionState, threads: int,
        kind: int | str,
    ) -> None:  # fmt: skip
        """Record `threads` programs of step(x, state); where `ops` cannot be recorded, run the step once instead.

        examples: three different inputs of the step; one is recorded, two are compared with the model's own step.
        """
        if not (self._watch.tensors and self._watch.is_current()):
            self.forget()
            self._watch = Watch(model, self.direction)
        key = _key(ops, examples[0], state, kind)
        recorder = dispatch.recorder(ops)
        while self._count.get(key, 0) < threads:
            packing.count_preparation()
            if recorder is None or not self._watch.counts_edits():
                step(examples[0], state.clone())
                return
            recorded = _record(recorder, step, examples, state)
            if recorded is None:
                return
            _log.debug("recorded a step: %s, %s, input %s", self.direction, kind, tuple(examples[0].shape))
            self._idle.setdefault(key, []).append(recorded)
            self._count[key] = self._count.get(key, 0) + 1


def _key(ops: Ops, x: Tensor, state: DirectionState, kind: int | str) -> Key:
    pooled = state.rows is not None  # then a program serves pools of any size
    buffers = [(tensor.shape[pooled:], tensor.dtype, tensor.is_contiguous()) for tensor in state.buffers.values()]
    return (kind, ops, x.shape, x.dtype, pooled, *buffers, torch.get_num_threads())


def _record(
    recorder: ModuleType, step: Step, examples: list[Tensor], state: DirectionState
) -> tuple[Program, int] | None:
    """A program and the positions that it advances by; None if it cannot be recorded or differs from the model."""
    with torch.inference_mode(False), torch.no_grad():
        scratch, mine, theirs = _Scratch(state), state.clone(), state.clone()
        recorded, *others = examples
        try:
            program = recorder.Program(lambda x: step(x, scratch), recorded, _tensors(scratch))
        except recorder.NotRecordable:
            return None
        for x in others:
            y, truth = program.run(x, _tensors(mine)), step(x, theirs)
            mine.advance(scratch.positions)
            pairs = zip((*y, *_tensors(mine)), (*truth, *_tensors(theirs)), strict=True)
            if not all(torch.equal(*pair) for pair in pairs):
                return None
    return program, scratch.positions
