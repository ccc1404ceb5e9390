"""Packed weights: a kernel's own layout of a weight, computed once and again after any change of the weight."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Packed = TypeVar("Packed")
_Key = tuple[int, str, tuple[bool, ...]]  # the first tensor's id, the layout, which arguments are there

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedWeight:
    """A row of `packing_report`: a weight of shape `shape`, packed as `layout` into `nbytes` bytes in `seconds`."""

    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    seconds: float


class _Entry:
    """A packed weight, and the state of the tensors that it was made from."""

    def __init__(
        self, key: _Key, tensors: tuple[Tensor, ...], result: Any, stream: torch.cuda.Stream | None, seconds: float
    ):
        self.result, self.streams = result, [stream]
        first = tensors[0]
        self.row = PackedWeight(key[1], tuple(first.shape), first.dtype, _nbytes(result), seconds)
        self.event = None if stream is None else stream.record_event()
        self.tensors = [weakref.ref(t) for t in tensors]
        self.first = weakref.ref(tensors[0], partial(_forget, _entries, key))
        # the weak references keep the address of a storage from being reused for another one
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self.states = [(t._version, t.storage_offset(), t.dtype, t.stride()) for t in tensors]

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        return all(
            ref() is t and t.untyped_storage()._cdata == storage.cdata
            and (t._version, t.storage_offset(), t.dtype, t.stride()) == state
            for t, ref, storage, state in zip(tensors, self.tensors, self.storages, self.states, strict=True)
        )  # fmt: skip

    def use_on(self, stream: torch.cuda.Stream) -> None:
        """Let a stream other than the one that packed it use the result, which then outlives that use."""
        assert self.event is not None
        stream.wait_event(self.event)
        for tensor in _tensors(self.result):
            tensor.record_stream(stream)
        self.streams.append(stream)


def is_capturing(device: torch.device) -> bool:
    """Whether what the current stream of a GPU is given is captured and not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# What captured graphs use, for as long as the process lives: they hold addresses, not references
_captured: dict[int, object] = {}


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple | list) else []


def _nbytes(result: object) -> int:
    return sum(tensor.nbytes for tensor in _tensors(result))


def _forget(entries: dict[_Key, _Entry], key: _Key, _: object) -> None:
    entries.pop(key, None)


_entries: dict[_Key, _Entry] = {}
_steps = 0  # of optimizers: fused ones edit weights without incrementing their version


def _after_a_step(*_: object) -> None:
    global _steps
    _steps += 1
    _entries.clear()


@cache
def _watch_optimizers() -> None:
    """Hear of every optimizer step in this process, from the first packing on."""
    register_optimizer_step_post_hook(_after_a_step)


def generation() -> int:
    """A number that changes when weights may have been edited without incrementing their version."""
    return _steps


def packing_report() -> list[PackedWeight]:
    """What is packed now, in the order in which it was packed. Its bytes are in addition to the weights' own."""
    return [entry.row for entry in list(_entries.values())]


_preparations = 0


def preparations() -> int:
    """How often weights have been packed or steps recorded so far; constant in a steady state."""
    return _preparations


def count_preparation() -> None:
    """Count one packing or recording."""
    global _preparations
    _preparations += 1


def packed(tensors: Tensor | tuple[Tensor | None, ...], layout: str, pack: Callable[..., Packed]) -> Packed:
    """The result of pack(*tensors), cached until one of the tensors is replaced, moved or edited.

    tensors: the first one must be there, others may be None.
    layout: its name; a tensor may be packed in several. The cache entry lives as long as the first tensor. Edits
    through `.data` increment no version counter and go unnoticed. Tensors made in inference mode have no version
    counter: they are packed at every call, with one warning. A CUDA graph that is being captured uses what is packed;
    what is not packed yet is packed at each replay.
    """
    arguments = (tensors,) if isinstance(tensors, Tensor) else tensors
    present = tuple(t for t in arguments if t is not None)
    key = id(present[0]), layout, tuple(t is not None for t in arguments)
    on_gpu, uncounted = present[0].is_cuda, any(t.is_inference() for t in present)
    capturing = on_gpu and is_capturing(present[0].device)
    if capturing and (found := _entries.get(key)) is not None and found.is_of(present):
        _captured[id(found.result)] = found.result
        return found.result
    if uncounted or capturing:
        if uncounted:
            _warn_of_inference_tensors()
        count_preparation()
        return pack(*map(_detached, arguments))
    stream = torch.cuda.current_stream(present[0].device) if on_gpu else None
    found = _entries.get(key)
    if found is None or not found.is_of(present):
        count_preparation()
        _watch_optimizers()
        start = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            result = pack(*map(_detached, arguments))
        found = _entries[key] = _Entry(key, present, result, stream, time.perf_counter() - start)
        _log.debug("packed %s", found.row)
    if stream is not None and stream not in found.streams:
        found.use_on(stream)
    return found.result


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@cache
def _warn_of_inference_tensors() -> None:
    warnings.warn(
        "some weights were made inside torch.inference_mode(): PyTorch counts no edits of such tensors, so they are "
        "packed again at every call, which is slow; make, move and load them outside of it (inside it, fastmimi's own "
        "models do so by themselves)",
        stacklevel=4,
    )


class Packable(nn.Module):
    """A module whose parameters and buffers never become inference tensors, whose edits PyTorch does not count.

    So its weights are packed once even if it is moved, cast or loaded inside `torch.inference_mode()`.
    """

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packable:
        leave_inference_mode(self)
        return super()._apply(fn, recurse)

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`."""
        leave_inference_mode(self)
        counted = copy(state_dict)  # with its metadata
        for name, tensor in state_dict.items():
            if isinstance(tensor, Tensor) and tensor.is_inference():
                counted[name] = tensor.clone()  # type: ignore[index]
        return super().load_state_dict(counted, strict, assign)


@torch.inference_mode(False)
def leave_inference_mode(module: nn.Module) -> None:
    """Replace every parameter and buffer of a module that is an inference tensor by a normal copy, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
