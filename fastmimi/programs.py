"""Steps of streams as recorded programs: on a CPU, a frame is otherwise a third Python.

A program is recorded once a shape has been stepped a few times, and used only if its first run gives, bit for bit, what
the model gives, output and state. It is thrown away when a weight, a module or the choice of kernels changes. The
streams' state is put in at each run: one program serves all streams of a batch size; threads that step at once have
one each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import dispatch, memory
from .ops import Ops
from .state import Lane

AFTER = 4  # steps of a shape before it is recorded
MOST_FRAMES = 4  # longer steps do not notice what is between their layers
MOST_SHAPES = 64  # then all programs are dropped
PAUSE = 1000  # steps until a shape that could not be recorded is tried again

Step = Callable[[Tensor, Lane], list[Tensor]]
Key = tuple[Any, ...]


class _Scratch(Lane):
    """A lane to record with: its `first` has an address, and it tells by how much it was advanced."""

    def __init__(self, lane: Lane):
        super().__init__(
            {name: buffer.clone() for name, buffer in lane.buffers.items()}, lane.offset.clone(), lane.active.clone()
        )
        self.start = lane.first.clone()
        self.positions = 0

    @property
    def first(self) -> Tensor:
        return self.start

    def advance(self, positions: int) -> None:
        self.positions = positions


def _tensors(lane: Lane) -> list[Tensor]:
    return [*lane.buffers.values(), lane.offset, lane.active, lane.first]


def _another(x: Tensor) -> Tensor:
    """An input of the shape, valid where x is: noise, or codes that all differ. Codes that are all 0 stay."""
    if x.is_floating_point():
        return torch.empty_like(x).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    return torch.where(x > 0, x - 1, x.max())


class Programs:
    """The programs of one direction of a model. Copies and pickles of it begin empty."""

    def __init__(self, direction: str) -> None:
        self.direction = direction
        self.forget()

    def forget(self) -> None:
        """Drop all programs, and what they hold."""
        self._seen: dict[Key, int] = {}
        self._idle: dict[Key, list[tuple[Any, int]]] = {}  # programs that no thread is running, and their positions
        self._not_before: dict[Key, int] = {}  # steps of shapes that could not be recorded
        self._modules: list[Any] = []
        self._hooks: list[dict[Any, Any]] = []
        self._owners: list[dict[str, Any]] = []  # of modules, parameters and buffers
        self._owned: list[Any] = []  # what they held when it was remembered
        self._tensors: list[Tensor] = []  # among those
        self._states: list[tuple[int, int]] = []
        self._modes: list[bool] = []  # of the modules: training or not
        self._generation = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, (self.direction,)

    def step(self, model: Any, ops: Ops, step: Step, x: Tensor, lane: Lane, *options: Any) -> list[Tensor]:
        """step(x, lane), of a codec that calls `ops`, by a program where there is one.

        `options` tells apart steps that the shapes do not.
        """
        if torch.compiler.is_compiling():
            return step(x, lane)
        state = [(tensor.shape, tensor.dtype, tensor.is_contiguous()) for tensor in lane.buffers.values()]
        key = (*options, ops, x.shape, x.dtype, *state, torch.get_num_threads())
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if count <= max(AFTER, self._not_before.get(key, 0)):
            return step(x, lane)
        if len(self._seen) > MOST_SHAPES or not self._current():
            self.forget()
            self._remember(model)
            return step(x, lane)
        if any(self._hooks):  # which a program would not call
            return step(x, lane)
        idle = self._idle.setdefault(key, [])
        try:
            program, positions = idle.pop()
        except IndexError:  # none yet, or all are running in other threads
            other = _another(x)
            if torch.equal(other, x):
                return step(x, lane)
            recorded = self._record(dispatch.recorder(ops), step, x, other, lane)
            if recorded is None:
                self._not_before[key] = count + PAUSE
                return step(x, lane)
            program, positions = recorded
        y = program.run(x, _tensors(lane))
        idle.append((program, positions))
        lane.advance(positions)
        return y

    def _record(self, recorder: Any, step: Step, x: Tensor, other: Tensor, lane: Lane) -> tuple[Any, int] | None:
        """A program that gives what the model gives, with its positions; None where there is none.

        Recorded on another input than x, so that what is not in the program is noticed on x.
        """
        if recorder is None or any(t.is_inference() for t in self._tensors):  # whose edits nobody counts
            return None
        with torch.inference_mode(False), torch.no_grad():
            scratch, mine, theirs = _Scratch(lane), _Scratch(lane), _Scratch(lane)
            try:
                program = recorder.Program(lambda x: step(x, scratch), other, _tensors(scratch))
            except recorder.NotRecordable:
                return None
            y, truth = program.run(x, _tensors(mine)), step(x, theirs)
            pairs = zip((*y, *_tensors(mine)), (*truth, *_tensors(theirs)), strict=True)
            same = all(torch.equal(*pair) for pair in pairs)
        return (program, scratch.positions) if same else None

    def _remember(self, model: Any) -> None:
        parts = [part for part in (*model.parts(self.direction), model.quantizer) if part is not None]
        self._modules = modules = [module for part in parts for module in part.modules()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        owners = [held for m in modules for held in (m._modules, m._parameters, m._buffers)]
        self._owners = [model._modules, *filter(None, owners)]
        self._owned = self._owned_now()
        self._tensors = [x for x in self._owned if isinstance(x, Tensor)]
        self._states, self._modes = self._states_now(), self._modes_now()
        self._generation = memory.generation()

    def _current(self) -> bool:
        """Whether all modules and weights are those that were remembered, as far as PyTorch counts edits."""
        owned = self._owned_now()
        same = len(owned) == len(self._owned) and all(map(is_, owned, self._owned))
        same = same and self._generation == memory.generation() and self._modes_now() == self._modes
        return same and self._states_now() == self._states

    def _owned_now(self) -> list[Any]:
        """All modules, parameters and buffers, in order. At every step: so without a loop of Python's."""
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def _modes_now(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _states_now(self) -> list[tuple[int, int]]:
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self._tensors]
