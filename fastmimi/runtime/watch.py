"""Whether a model is still what it was when its steps were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Protocol

from torch import Tensor, nn

from . import packing


class Model(Protocol):
    """What is recorded, a codec."""

    _modules: dict[str, nn.Module | None]

    @property
    def quantizer(self) -> nn.Module: ...

    def parts(self, direction: str) -> list[nn.Module | None]: ...


class Watch:
    """The modules and weights of one direction of a model, as they were when the watch was made.

    Without a model it watches nothing, and nothing changes. Edits that PyTorch does not count go unnoticed.
    """

    def __init__(self, model: Model | None = None, direction: str = ""):
        parts: list[nn.Module | None] = [] if model is None else [*model.parts(direction), model.quantizer]
        self._modules = modules = [module for part in parts if part is not None for module in part.modules()]
        self._hooks: list[Mapping[int, object]] = []
        self._owners: list[dict[str, Any]] = [] if model is None else [model._modules]
        for m in modules:
            self._hooks += (m._forward_hooks, m._forward_pre_hooks)
            self._owners += filter(None, (m._modules, m._parameters, m._buffers))
        self._owned = self._owned_now()
        self.tensors = [x for x in self._owned if isinstance(x, Tensor)]
        self._counted = [x for x in self.tensors if not x.is_inference()]
        self._states, self._modes = self._states_now(), self._modes_now()
        self._generation = packing.generation()

    def is_current(self) -> bool:
        """Whether all modules and weights are the same and unchanged."""
        owned = self._owned_now()
        same = len(owned) == len(self._owned) and all(map(is_, owned, self._owned))
        same = same and self._generation == packing.generation() and self._modes_now() == self._modes
        return same and self._states_now() == self._states

    def counts_edits(self) -> bool:
        """Whether PyTorch counts the edits of all weights: not of those that were made in inference mode."""
        return len(self._counted) == len(self.tensors)

    def has_hooks(self) -> bool:
        """Whether a module has hooks now, which a recorded step would not call."""
        return any(self._hooks)

    # Called at every step, hence without a Python loop

    def _owned_now(self) -> list[object]:
        """All modules, parameters and buffers, in order."""
        return [*chain.from_iterable(map(dict.values, self._owners))]

    def _modes_now(self) -> list[bool]:
        return [*map(attrgetter("training"), self._modules)]

    def _states_now(self) -> list[int]:
        """The versions of the tensors that have one, and the addresses of all."""
        return [*map(attrgetter("_version"), self._counted), *map(Tensor.data_ptr, self.tensors)]
