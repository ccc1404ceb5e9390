"""How kernels want tensors in memory: channels next to each other, and weights packed once. A leaf."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Packed = TypeVar("Packed")


def time_major(x: Tensor) -> Tensor:
    """x [B, C, T] with channels next to each other in memory: as it is, or a copy."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_time_major(x: Tensor, channels: int, length: int) -> Tensor:
    """[B, channels, length], empty, channels next to each other in memory."""
    return x.new_empty(x.shape[0], length, channels).transpose(1, 2)


class _Form:
    """A packed form, and the state of the tensors that it was made of."""

    def __init__(self, key: tuple[int, str], tensors: tuple[Tensor, ...], form: Any, stream: Any):
        self.form, self.stream = form, stream
        self.event: Any = None if stream is None else stream.record_event()
        self.tensors = [weakref.ref(t) for t in tensors]
        self.first = weakref.ref(tensors[0], partial(_forget, _forms, key))
        # the weak references keep a storage's identity from being given to another one
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        self.states = [(t._version, t.storage_offset(), t.dtype, t.stride()) for t in tensors]

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        return all(
            ref() is t and t.untyped_storage()._cdata == storage.cdata
            and (t._version, t.storage_offset(), t.dtype, t.stride()) == state
            for t, ref, storage, state in zip(tensors, self.tensors, self.storages, self.states, strict=True)
        )  # fmt: skip


def _forget(forms: dict[tuple[int, str], _Form], key: tuple[int, str], _: Any) -> None:
    forms.pop(key, None)


_forms: dict[tuple[int, str], _Form] = {}
_steps = 0  # of optimizers: fused ones edit weights without counting a version


def _after_a_step(*_: Any) -> None:
    global _steps
    _steps += 1
    _forms.clear()


register_optimizer_step_post_hook(_after_a_step)


def generation() -> int:
    """Changes when weights may have been edited without a sign on them."""
    return _steps


def packed(tensors: Tensor | tuple[Tensor, ...], form: str, pack: Callable[..., Packed]) -> Packed:
    """pack(*tensors), computed once for each state of the tensors: replaced, moved or edited ones are packed anew.

    The form lives as long as the first of them. Edits through `.data` count no version and are not seen. A CUDA graph
    packs on its own, at each replay.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    on_gpu = tensors[0].is_cuda
    if any(t.is_inference() for t in tensors) or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return pack(*(t.detach() for t in tensors))
    key = id(tensors[0]), form
    stream = torch.cuda.current_stream(tensors[0].device) if on_gpu else None
    found = _forms.get(key)
    if found is None or not found.is_of(tensors):
        with torch.inference_mode(False), torch.no_grad():
            result = pack(*(t.detach() for t in tensors))
        found = _forms[key] = _Form(key, tensors, result, stream)
    if stream is not None and stream != found.stream:
        stream.wait_event(found.event)
    return found.form
