"""fastmimi inside larger models: every transformers Mimi in CSM, Moshi, a Qwen3-TTS tokenizer, ... becomes ours."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from .transformers import PEERS, Bound, Codebook, adopt, ours, peer

_REPLACEMENTS: dict[type, type] = {}


def replace_mimi(model: nn.Module) -> nn.Module:
    """Make every transformers Mimi in `model` (or `model` itself) a fastmimi one, in place, and return `model`.

    The modules and their parameters stay the same objects; only what computes with them changes. Subclasses keep what
    they override. `restore_mimi` undoes it.
    """
    for module in _modules(model):
        if isinstance(module, PEERS) and not isinstance(module, Bound):
            module.__class__ = _replacement(type(module))
            adopt(module, _replacement)
    return model


def restore_mimi(model: nn.Module) -> nn.Module:
    """Undo `replace_mimi`, in place, and return `model`; models made as fastmimi's stay so."""
    for module in _modules(model):
        if (original := getattr(type(module), "_replaces", None)) is not None:
            module.__class__ = original
            module.__dict__.pop("_binding", None)
            for part in module.modules():
                if type(part) is Codebook:
                    part.__class__ = peer.MimiEuclideanCodebook
                    part._embed = None  # what the peer had cached may be of other sums
                    part.to(module.dtype)  # the peer's codebooks are of the model's precision
    return model


def _modules(model: Any) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())


def _replacement(cls: type) -> type:
    """A class that computes as fastmimi's and is otherwise `cls`, which it remembers."""
    if cls not in _REPLACEMENTS:
        if cls in PEERS:
            bases: tuple[type, ...] = (ours(cls),)
        else:  # a subclass: its own overrides first, then ours, then the peer's
            bases = (cls, next(ours(base) for base in cls.__mro__ if base in PEERS))
        names = {"_replaces": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _REPLACEMENTS[cls] = type(cls.__name__, bases, names)
    return _REPLACEMENTS[cls]
