"""Binding: a core `Mimi` that computes with the modules of a transformers model, sharing every parameter.

The core's leaves (convolutions, linears, norms, codebooks) are replaced by the peer's own, so that `.to`, adapters,
`load_state_dict`, weight norm and optimizers act on both. Where the peer's modules have since been replaced, it is
bound anew.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..models.config import CodecConfig
from ..models.mimi import Mimi

NESTED = (  # flat path -> path in transformers >= 5.20, whose halves are models of their own
    (r"^(encoder|decoder)\.layers\.", r"\1.\1_seanet.layers."),
    (r"^(encoder_transformer|downsample)", r"encoder.\1"),
    (r"^(decoder_transformer|upsample)", r"decoder.\1"),
)


class Binding:
    """The core of one peer model; `current()` says whether the peer still has the modules it was made from."""

    def __init__(self, peer: Any):
        self._edges: dict[tuple[int, str], tuple[nn.Module, str, nn.Module | None]] = {}
        config = CodecConfig.from_dict(peer.config.to_dict())
        stride = config.latent_stride > 1
        config.has_encoder = self._has(peer, "encoder_transformer", "encoder.layers", *["downsample"] * stride)
        config.has_decoder = self._has(peer, "decoder_transformer", "decoder.layers", *["upsample"] * stride)
        with torch.device("meta"):
            self.core = Mimi(config)
        for path in [path for path, module in self.core.named_modules() if _is_leaf(module)]:
            parent, _, name = path.rpartition(".")
            leaf = self._find(peer, path)
            if leaf is not None:  # a half of a codec has no quantizer
                self.core.get_submodule(parent)._modules[name] = leaf
        self._transformers = [
            (getattr(self.core, name), self._find(peer, name))
            for name in ("encoder_transformer", "decoder_transformer")
            if getattr(self.core, name) is not None
        ]

    def current(self) -> bool:
        return all(parent._modules.get(name) is child for parent, name, child in self._edges.values())

    def follow(self, peer: Any) -> Mimi:
        """The core, in the peer's mode."""
        for mine, theirs in self._transformers:
            mine.gradient_checkpointing = getattr(theirs, "gradient_checkpointing", False)
        if self.core.training != peer.training:
            self.core.train(peer.training)
        self.core.impl = peer.impl
        return self.core

    def _has(self, peer: Any, *paths: str) -> bool:
        return all(self._find(peer, path) is not None for path in paths)

    def _find(self, peer: Any, path: str) -> nn.Module | None:
        """The peer's module under a flat path, and a note of every step there."""
        for candidate in dict.fromkeys((path, _nested(path), _nested(path).partition(".")[2])):
            module: nn.Module | None = peer
            steps = candidate.split(".")
            found: list[tuple[nn.Module, str, nn.Module | None]] = []
            for step in steps:
                if module is None:
                    break
                child = module._modules.get(step)
                found.append((module, step, child))
                module = child
            if module is not None:
                self._edges |= {(id(parent), step): (parent, step, child) for parent, step, child in found}
                return module
        return None


def _nested(path: str) -> str:
    for pattern, replacement in NESTED:
        path = re.sub(pattern, replacement, path + ".")[:-1]
    return path


def _is_leaf(module: nn.Module) -> bool:
    return bool(module._parameters or module._buffers)
