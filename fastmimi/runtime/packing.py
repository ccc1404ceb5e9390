"""Weights in the layout of a kernel, packed once for each state of the weights. Imports nothing of ours."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from copy import copy
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Packed = TypeVar("Packed")


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


_preparations = 0


def preparations() -> int:
    """How often weights have been packed and steps recorded so far: constant where a benchmark measures."""
    return _preparations


def count_preparation() -> None:
    """Count work that is done once and used many times."""
    global _preparations
    _preparations += 1


def packed(tensors: Tensor | tuple[Tensor, ...], form: str, pack: Callable[..., Packed]) -> Packed:
    """pack(*tensors), computed once for each state of the tensors: replaced, moved or edited ones are packed anew.

    The result lives as long as the first of them. Edits through `.data` increment no version counter and are not seen.
    Tensors made in inference mode have no version counter: they are packed at every call, with one warning. A CUDA
    graph packs on its own, at each replay.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    on_gpu = tensors[0].is_cuda
    uncounted = any(t.is_inference() for t in tensors)
    if uncounted or (on_gpu and torch.cuda.is_current_stream_capturing()):
        if uncounted:
            _warn_of_inference_tensors()
        count_preparation()
        return pack(*(t.detach() for t in tensors))
    key = id(tensors[0]), form
    stream = torch.cuda.current_stream(tensors[0].device) if on_gpu else None
    found = _forms.get(key)
    if found is None or not found.is_of(tensors):
        count_preparation()
        with torch.inference_mode(False), torch.no_grad():
            result = pack(*(t.detach() for t in tensors))
        found = _forms[key] = _Form(key, tensors, result, stream)
    if stream is not None and stream != found.stream:
        stream.wait_event(found.event)
    return found.form


@cache
def _warn_of_inference_tensors() -> None:
    warnings.warn(
        "some weights were made inside torch.inference_mode(): PyTorch counts no edits of such tensors, so they are "
        "packed again at every call, which is slow; make, move and load them outside of it (inside it, fastmimi's own "
        "models do so by themselves)",
        stacklevel=4,
    )


class Packable(nn.Module):
    """A module whose weights can be packed once even if it is moved, cast or loaded inside `torch.inference_mode()`.

    Its parameters and buffers are never inference tensors, whose edits PyTorch does not count.
    """

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
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
    """Replace the inference tensors among all parameters and buffers of a module by normal copies, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
