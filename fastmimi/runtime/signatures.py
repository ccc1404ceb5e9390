"""The signatures of the ops, for type checkers: what models may pass, and what every backend takes.

Arguments are described in `reference/<op>.py`, which each signature repeats; tests compare all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypedDict

import torch
from torch import Tensor


class Padding(TypedDict, total=False):
    """What stands before and after the input of a convolution: padding, or the history of streams."""

    pad: tuple[int, int]
    pad_mode: str
    history: Tensor
    first: Tensor
    active: Tensor
    rows: Tensor | None


class History(TypedDict, total=False):
    """The last inputs of the previous calls of streams."""

    history: Tensor
    first: Tensor
    active: Tensor
    rows: Tensor | None


class RingCaches(TypedDict, total=False):
    """The keys and values of the last positions of streams."""

    offset: Tensor
    cache_k: Tensor
    cache_v: Tensor
    active: Tensor
    rows: Tensor | None


class CausalConv1d(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1,
        groups: int = 1, pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", pre: str = "none",
        post: str = "none", residual: Tensor | None = None, scales: Tensor | None = None,
        history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class CausalConvTranspose1d(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1,
        trim: tuple[int, int] = (0, 0), pre: str = "none", scales: Tensor | None = None,
        history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class Resblock(Protocol):
    def __call__(
        self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, dilation: int = 1,
        pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", post: str = "none",
        shortcut_weight: Tensor | None = None, shortcut_bias: Tensor | None = None, scales: Tensor | None = None,
        history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class AudioResblock(Protocol):
    def __call__(
        self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, audio_weight: Tensor,
        audio_bias: Tensor, *, after: bool = False, dilation: int = 1, post: str = "none",
    ) -> Tensor: ...  # fmt: skip


class WindowAttention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int, rope_scale: float = 1.0,
        interleaved: bool = False, dropout: float = 0.0, offset: Tensor | None = None,
        cache_k: Tensor | None = None, cache_v: Tensor | None = None, active: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class TransformerLayer(Protocol):
    def __call__(
        self, x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
        scale1: Tensor | None, norm2_weight: Tensor, norm2_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
        scale2: Tensor | None, inv_freq: Tensor, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
        v_bias: Tensor | None = None, o_bias: Tensor | None = None, scales: Tensor | None = None, *, window: int,
        eps: float, norm: str = "layer", activation: str | Callable[[Tensor], Tensor] = "gelu",
        rope_scale: float = 1.0, dropout: float = 0.0, residual_dropout: float = 0.0, offset: Tensor | None = None,
        cache_k: Tensor | None = None, cache_v: Tensor | None = None, active: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class RvqEncode(Protocol):
    def __call__(self, x: Tensor, codebooks: Tensor) -> Tensor: ...


class RvqDecode(Protocol):
    def __call__(self, codes: Tensor, codebooks: Tensor, *, dtype: torch.dtype | None = None) -> Tensor: ...
