"""Widening: a wider codec that starts as the function of a narrower one (Net2Net, arXiv 1511.05641).

What a new channel computes is random, and nothing uses it yet: its weights in the old channels of the next layer are
zero, but they have gradients. Convolutions therefore give the old channels exactly; in a transformer a LayerNorm also
averages over the new channels, which changes a little.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from ..errors import InputError, shown
from ..models.codec import Codec
from ..models.config import MimiCodecConfig
from ..models.registry import build
from ..models.validation import Json
from ..runtime.dispatch import Impl
from .initialization import variance_preserving_init_


def widen(narrow: Codec, changes: Json, impl: Impl = "auto") -> Codec:
    """A Mimi with the weights of `narrow`, and with `changes` of its MimiCodecConfig that give it more channels.

    Raises InputError for another architecture, for a field that a MimiCodecConfig does not have, and for changes after
    which a tensor is smaller or does not exist in both.
    """
    config = narrow.config
    if not isinstance(config, MimiCodecConfig):
        raise InputError(f"only a Mimi can be widened, got a {type(narrow).__name__}")
    known = [field.name for field in fields(config)]
    for name in changes:
        if name not in known:
            raise InputError(f"model.widen must name fields of MimiCodecConfig ({', '.join(known)}), got {name!r}")
    wide = build(replace(config, **changes), impl=impl)
    variance_preserving_init_(wide)
    old, new = narrow.state_dict(), wide.state_dict()
    if old.keys() != new.keys():
        raise InputError(f"model.widen must keep the number of layers and of codebooks, got {shown(changes)}")
    for name, tensor in new.items():
        if any(a > b for a, b in zip(old[name].shape, tensor.shape, strict=True)):
            raise InputError(
                f"model.widen must give no fewer channels: {name} would go from {[*old[name].shape]} to "
                f"{[*tensor.shape]}"
            )
        module = wide.get_submodule(name.rpartition(".")[0])
        _write(old[name], tensor, _input_dimension(module) if name.endswith(".weight") else None)
    return wide


def _input_dimension(module: nn.Module) -> int | None:
    """The dimension of a layer's weight that is its input channels; None if each output has one input."""
    if isinstance(module, nn.ConvTranspose1d):
        return 0 if module.groups == 1 else None
    return 1 if isinstance(module, nn.Conv1d | nn.Linear) else None


@torch.no_grad()
def _write(old: Tensor, new: Tensor, inputs: int | None) -> None:
    """Write the old tensor to the first indices of the new one, and zeros to new inputs of old outputs."""
    corner = [slice(size) for size in old.shape]
    if inputs is not None:
        beyond = [*corner]
        beyond[inputs] = slice(old.shape[inputs], None)
        new[tuple(beyond)] = 0
    new[tuple(corner)] = old
