"""A core `Mimi` that computes with the modules of a transformers model (the peer) and shares all of its parameters.

The core is a `fastmimi.Mimi` whose leaf modules (convolutions, linear layers, norms, codebooks) are the peer's own
objects. Whatever changes them, such as `.to`, adapters, `load_state_dict`, weight norm or an optimizer, therefore acts
on both. If one of the peer's modules is replaced later, `Binding.is_current` becomes false, and a new binding is made.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models.config import MimiCodecConfig
from ..models.mimi import Mimi

if TYPE_CHECKING:
    from .transformers import DropIn

NESTED = (  # flat path -> path in transformers >= 5.20, where encoder and decoder are models of their own
    (r"^(encoder|decoder)\.layers\.", r"\1.\1_seanet.layers."),
    (r"^(encoder_transformer|downsample)", r"encoder.\1"),
    (r"^(decoder_transformer|upsample)", r"decoder.\1"),
)


class Binding:
    """The core of one peer model, made from the modules that the peer has at that time.

    Raises InputError for a configuration that `Mimi` does not support.
    """

    def __init__(self, peer: DropIn):
        # Every lookup of a submodule that was made: (parent, name, child), child None where there was none
        self._lookups: dict[tuple[int, str], tuple[nn.Module, str, nn.Module | None]] = {}
        config = MimiCodecConfig.from_dict(peer.config.to_dict())
        resampled = config.latent_stride > 1
        config.has_encoder = self._has(peer, "encoder_transformer", "encoder.layers", *["downsample"] * resampled)
        config.has_decoder = self._has(peer, "decoder_transformer", "decoder.layers", *["upsample"] * resampled)
        with torch.device("meta"):
            self.core = Mimi(config)
        for path in [path for path, module in self.core.named_modules() if _is_leaf(module)]:
            parent, _, name = path.rpartition(".")
            leaf = self._find(peer, path)
            if leaf is not None:  # MimiEncoderModel and MimiDecoderModel have no quantizer
                self.core.get_submodule(parent)._modules[name] = leaf
        self._transformers = [
            (getattr(self.core, name), self._find(peer, name))
            for name in ("encoder_transformer", "decoder_transformer")
            if getattr(self.core, name) is not None
        ]

    def is_current(self) -> bool:
        """Whether the peer still has the modules that the core was made from."""
        return all(parent._modules.get(name) is child for parent, name, child in self._lookups.values())

    def synced_core(self, peer: DropIn) -> Mimi:
        """The core, after copying the peer's training mode, gradient checkpointing and `impl` to it."""
        for ours, theirs in self._transformers:
            ours.gradient_checkpointing = getattr(theirs, "gradient_checkpointing", False)
        if self.core.training != peer.training:
            self.core.train(peer.training)
        self.core.impl = peer.impl
        return self.core

    def _has(self, peer: nn.Module, *paths: str) -> bool:
        return all(self._find(peer, path) is not None for path in paths)

    def _find(self, peer: nn.Module, path: str) -> nn.Module | None:
        """The peer's module at a flat path, in whichever layout it is, or None; its lookups are recorded.

        The path is tried as it is, in the nested layout, and in that layout without its first part, for a peer that is
        itself an encoder or a decoder.
        """
        for candidate in dict.fromkeys((path, _nested(path), _nested(path).partition(".")[2])):
            module: nn.Module | None = peer
            lookups: list[tuple[nn.Module, str, nn.Module | None]] = []
            for name in candidate.split("."):
                if module is None:
                    break
                child = module._modules.get(name)
                lookups.append((module, name, child))
                module = child
            if module is not None:
                self._lookups |= {(id(parent), name): (parent, name, child) for parent, name, child in lookups}
                return module
        return None


def _nested(path: str) -> str:
    """A flat path in the nested layout."""
    for pattern, replacement in NESTED:
        path = re.sub(pattern, replacement, path + ".")[:-1]
    return path


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers of its own."""
    return bool(module._parameters or module._buffers)
