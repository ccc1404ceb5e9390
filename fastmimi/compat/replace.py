"""Replace transformers' Mimi with fastmimi's inside a larger model, such as CSM, Moshi or a Qwen3-TTS tokenizer."""

from __future__ import annotations

from torch import nn
from transformers.models.mimi import modeling_mimi as peer

from ..errors import InputError
from .transformers import PEERS, Codebook, DropIn, adopt, drop_in_for

_REPLACEMENTS: dict[type, type] = {}


def replace_mimi(model: nn.Module) -> nn.Module:
    """Turn every transformers Mimi in `model`, or `model` itself, into a fastmimi drop-in, in place; return `model`.

    Modules and parameters stay the same objects; only the class of a module, and so the code that computes with it,
    changes. Subclasses keep the methods that they override. `restore_mimi` undoes it.
    Raises InputError if `model` is not a module.
    """
    for module in _modules(model):
        if isinstance(module, PEERS) and not isinstance(module, DropIn):
            module.__class__ = _replacement(type(module))
            adopt(module, _replacement)
    return model


def restore_mimi(model: nn.Module) -> nn.Module:
    """Undo `replace_mimi`, in place, and return `model`. Models that were created as fastmimi's are left unchanged.

    Raises InputError if `model` is not a module.
    """
    for module in _modules(model):
        if (original := getattr(type(module), "_replaces", None)) is not None:
            module.__class__ = original
            module.__dict__.pop("_binding", None)
            for submodule in module.modules():
                if type(submodule) is Codebook:
                    submodule.__class__ = peer.MimiEuclideanCodebook
                    submodule._embed = None  # the peer's cached entries may be out of date
                    submodule.to(module.dtype)  # the peer's codebooks have the model's precision
    return model


def _modules(model: object) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())


def _replacement(cls: type) -> type:
    """The class that stands in for `cls`, with its name and its overrides; `restore_mimi` reads `_replaces`."""
    if cls not in _REPLACEMENTS:
        if cls in PEERS:
            bases: tuple[type, ...] = (drop_in_for(cls),)
        else:  # a subclass; in the method resolution order: its own overrides, then the drop-in, then the peer's class
            bases = (cls, next(drop_in_for(base) for base in cls.__mro__ if base in PEERS))
        attributes = {"_replaces": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _REPLACEMENTS[cls] = type(cls.__name__, bases, attributes)
    return _REPLACEMENTS[cls]
