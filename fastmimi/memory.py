"""How kernels want tensors in memory: channels next to each other, and weights packed once. A leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

Packed = TypeVar("Packed")


def time_major(x: Tensor) -> Tensor:
    """x [B, C, T] with channels next to each other in memory: as it is, or a copy."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_time_major(x: Tensor, channels: int, length: int) -> Tensor:
    """[B, channels, length], empty, channels next to each other in memory."""
    return x.new_empty(x.shape[0], length, channels).transpose(1, 2)


_packed: Any = WeakTensorKeyDictionary()
# fused optimizers edit weights without counting a version
register_optimizer_step_post_hook(lambda *_: _packed.clear())


def packed(tensors: Tensor | tuple[Tensor, ...], form: str, pack: Callable[..., Packed]) -> Packed:
    """pack(tensors), computed once for each state of the tensors: replaced, moved or edited ones are packed anew.

    Edits through `.data` count no version and are not seen. A CUDA graph packs on its own, at each replay.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    on_gpu = tensors[0].device.type == "cuda"
    if any(t.is_inference() for t in tensors) or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return pack(*(t.detach() for t in tensors))
    # the weak references keep a storage's identity from being given to another one
    state = [(StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.dtype, t._version) for t in tensors]
    stream = torch.cuda.current_stream(tensors[0].device) if on_gpu else None
    forms = _packed.setdefault(tensors[0], {})
    if form not in forms or forms[form][0] != state:
        with torch.inference_mode(False), torch.no_grad():
            result = pack(*(t.detach() for t in tensors))
        forms[form] = (state, result, stream, stream.record_event() if stream is not None else None)
    _, result, made_on, event = forms[form]
    if stream is not None and stream != made_on:
        stream.wait_event(event)
    return result
