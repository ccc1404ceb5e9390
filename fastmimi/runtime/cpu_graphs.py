"""Steps of streams as recorded programs: on a CPU, a third of a frame's time is otherwise spent in Python.

`Codec.warm_up` records a step of a shape, which is then run instead of the model's. A program is kept only if it gives,
bit for bit, what the model gives, output and state, for two steps in a row. It is thrown away when a weight, a module
or the choice of kernels changes. The stream's state is put in at each run: one program serves all streams of a batch
size; threads that step at the same time need one each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import dispatch, packing
from .ops import Ops
from .state import Lane, StreamState

MOST_FRAMES = 4  # of a step that is worth recording: in longer ones, the time between layers is small

Step = Callable[..., list[Tensor]]  # of an input, a lane and options
Key = tuple[Any, ...]


class _Scratch(Lane):
    """A lane to record with: its `first` has an address, and it tells by how much it was advanced."""

    def __init__(self, lane: Lane):
        copy = lane.clone()
        super().__init__(copy.buffers, copy.offset, copy.active)
        self.start = lane.first.clone()
        self.positions = 0

    @property
    def first(self) -> Tensor:
        return self.start

    def advance(self, positions: int) -> None:
        self.positions = positions


def _tensors(lane: Lane) -> list[Tensor]:
    return [*lane.buffers.values(), lane.offset, lane.active, lane.first]


class Programs:
    """The programs of one direction of a model. Copies and pickles of it begin empty."""

    def __init__(self, direction: str) -> None:
        self.direction = direction
        self.forget()

    def forget(self) -> None:
        """Drop all programs, and what they hold."""
        self._count: dict[Key, int] = {}  # programs of a step, idle or running
        self._idle: dict[Key, list[tuple[Any, int]]] = {}  # programs that no thread is running, and their positions
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

    def step(self, ops: Ops, step: Step, x: Tensor, lane: Lane, *options: Any) -> list[Tensor]:
        """step(x, lane, *options), of a codec that calls `ops`, by a recorded program where there is one."""
        if not self._idle or torch.compiler.is_compiling():
            return step(x, lane, *options)
        idle = self._idle.get(_key(ops, x, lane, options))
        if not idle:
            return step(x, lane, *options)
        if not self._current():
            self.forget()
            return step(x, lane, *options)
        if any(self._hooks):  # which a program would not call
            return step(x, lane, *options)
        try:
            program, positions = idle.pop()
        except IndexError:  # another thread has just taken it
            return step(x, lane, *options)
        y = program.run(x, _tensors(lane))
        idle.append((program, positions))
        lane.advance(positions)
        return y

    def record(
        self, model: Any, ops: Ops, step: Step, examples: list[Tensor], lane: Lane, threads: int, *options: Any
    ) -> None:
        """Have `threads` programs of step(x, lane, *options); without a recorder for `ops`, the step is run once.

        examples: three different inputs of the step; one is recorded, two are compared with the model's own step.
        """
        if not self._current():
            self.forget()
            self._remember(model)
        key = _key(ops, examples[0], lane, options)
        recorder = dispatch.recorder(ops)
        while self._count.get(key, 0) < threads:
            packing.count_preparation()
            if recorder is None or any(t.is_inference() for t in self._tensors):  # whose edits are not counted
                step(examples[0], lane.clone(), *options)
                return
            recorded = _record(recorder, lambda x, lane: step(x, lane, *options), examples, lane)
            if recorded is None:
                return
            self._idle.setdefault(key, []).append(recorded)
            self._count[key] = self._count.get(key, 0) + 1

    def _remember(self, model: Any) -> None:
        parts = [part for part in (*model.parts(self.direction), model.quantizer) if part is not None]
        self._modules = modules = [module for part in parts for module in part.modules()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        owners = [held for m in modules for held in (m._modules, m._parameters, m._buffers)]
        self._owners = [model._modules, *filter(None, owners)]
        self._owned = self._owned_now()
        self._tensors = [x for x in self._owned if isinstance(x, Tensor)]
        self._states, self._modes = self._states_now(), self._modes_now()
        self._generation = packing.generation()

    def _current(self) -> bool:
        """Whether all modules and weights are those that were remembered, as far as PyTorch counts edits."""
        owned = self._owned_now()
        same = len(owned) == len(self._owned) and all(map(is_, owned, self._owned))
        same = same and self._generation == packing.generation() and self._modes_now() == self._modes
        return same and self._states_now() == self._states

    def _owned_now(self) -> list[Any]:
        """All modules, parameters and buffers, in order. At every step: so without a loop of Python's."""
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def _modes_now(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _states_now(self) -> list[tuple[int, int]]:
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self._tensors]


def _key(ops: Ops, x: Tensor, lane: Lane, options: tuple[Any, ...]) -> Key:
    state = [(tensor.shape, tensor.dtype, tensor.is_contiguous()) for tensor in lane.buffers.values()]
    return (*options, ops, x.shape, x.dtype, *state, torch.get_num_threads())


def _record(recorder: Any, step: Step, examples: list[Tensor], lane: Lane) -> tuple[Any, int] | None:
    """A program that gives what the model gives, with its positions; None where there is none."""
    with torch.inference_mode(False), torch.no_grad():
        scratch, mine, theirs = _Scratch(lane), lane.clone(), lane.clone()
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


def warm_up(codec: Any, state: StreamState, frames: int, codebooks: int | None, threads: int) -> None:
    """`Codec.warm_up`: record both directions for steps of so many frames of codes, or of latents without codebooks."""
    draw = torch.Generator(codec.device).manual_seed(0)
    batch, channels, size = state.pending.shape

    def noise(*shape: int) -> Tensor:
        return state.pending.new_empty(shape).normal_(std=0.1, generator=draw)

    audio = [noise(batch, channels, frames * size) for _ in range(3)]
    if codebooks is None:
        coded = [noise(batch, codec.config.hidden_size, frames) for _ in range(3)]
    else:
        entries, shape = codec.config.codebook_size, (batch, codebooks, frames)
        coded = [torch.randint(entries, shape, generator=draw, device=codec.device) for _ in range(3)]
    ops, programs = codec._ops(), codec._programs
    if codec.encoder is not None:
        programs["encode"].record(codec, ops, codec._encode_tile, audio, state.encode, threads, codebooks)
    if codec.decoder is not None:
        programs["decode"].record(codec, ops, codec._decode_tile, coded, state.decode, threads)
