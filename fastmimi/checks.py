"""Checks of what users hand in: each answers the value, or raises InputError with one sentence that names it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import AnyConfig
from .errors import InputError
from .state import StreamState


def audio(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, channels, N] floating point."""
    if not isinstance(x, Tensor):
        raise InputError(f"audio must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1] != config.audio_channels:
        raise InputError(f"audio must be [batch, {config.audio_channels}, samples], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"audio must be floating point in [-1, 1], got {x.dtype}")
    return x


def finite(x: Tensor) -> Tensor:
    """No NaN, no infinity: one would spread over all frames that follow, silently."""
    # without a tensor of x's size: an hour of audio is 345 MB
    if (
        not torch.compiler.is_compiling()
        and x.numel()
        and not all(map(math.isfinite, map(float, x.detach().aminmax())))
    ):
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise InputError(f"audio must be finite, got {x[tuple(bad)].item()} at {bad}")
    return x


def codes(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, K, T] integers -> int64."""
    if not isinstance(x, Tensor):
        raise InputError(f"codes must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[0] == 0:
        raise InputError(f"codes must be [batch, codebooks, frames], got {tuple(x.shape)}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"codes must be integers, got {x.dtype}")
    codebook_count(x.shape[1], config)
    return x.long()


def code_range(x: Tensor, config: AnyConfig, ignored: Tensor | None = None) -> Tensor:
    """Codes [B, K, T] in [0, codebook_size); where `ignored` [B, T], whatever they are, 0."""
    if ignored is not None:
        if ignored.shape != (x.shape[0], x.shape[2]):
            raise InputError(
                f"padding_mask must be [batch, frames] = {(x.shape[0], x.shape[2])}, got {tuple(ignored.shape)}"
            )
        x = torch.where(ignored[:, None].to(x.device), 0, x)
    if x.numel() and not torch.compiler.is_compiling():
        low, high = (value.item() for value in x.aminmax())
        if low < 0 or high >= config.codebook_size:
            worst = low if low < 0 else high
            hint = "; -1 marks no frame: pass padding_mask=mimi.frame_mask(...)" if low == -1 else ""
            raise InputError(f"codes must lie in [0, {config.codebook_size}), got {worst}{hint}")
    return x


def codebook_count(count: int, config: AnyConfig) -> int:
    """At least the semantic codebooks, at most all of them."""
    least, most = config.num_semantic_quantizers, config.num_quantizers
    if count != int(count) or not least <= count <= most:
        raise InputError(f"the number of codebooks must be from {least} to {most}, got {count}")
    return int(count)


def latents(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, hidden_size, T] floating point."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != config.hidden_size or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"latents must be floating point [batch, {config.hidden_size}, frames], got {got}")
    return x


def streamable(config: AnyConfig) -> None:
    if not config.streamable:
        raise InputError(config.not_streamable_because)


def state(state: StreamState, shape: tuple[int | None, ...], device: torch.device, dtype: torch.dtype) -> None:
    """The state must be of this model's shape (None: of any batch size), device and dtype."""
    if not isinstance(state, StreamState):
        raise InputError(f"state must come from new_state(), got {type(state).__name__}")
    pending = state.pending
    if tuple(pending.shape) != (shape[0] or pending.shape[0], *shape[1:]):
        raise InputError(
            f"the state is for {pending.shape[0]} streams of frames {tuple(pending.shape[1:])}, got {shape}"
        )
    if pending.device != device or pending.dtype != dtype:
        raise InputError(
            f"the state is {pending.dtype} on {pending.device}, the model {dtype} on {device}: make a new_state()"
        )


def has_part(part: nn.Module | None, name: str, method: str) -> None:
    if part is None:
        raise InputError(f"{method} needs the {name}, which this model was made without")
