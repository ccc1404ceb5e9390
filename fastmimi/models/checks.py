"""Checks of arguments: each returns the value, or raises InputError with one sentence that names it."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError, shown
from ..runtime.state import StreamState
from .config import AnyConfig

if TYPE_CHECKING:
    from .codec import Codec

Config = TypeVar("Config", bound=AnyConfig)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_STREAMS = 1 << 16


def audio(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, channels, N] floating point."""
    _values(x, "audio")
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1] != config.audio_channels:
        raise InputError(f"audio must be [batch, {config.audio_channels}, samples], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"audio must be floating point in [-1, 1], got {x.dtype}")
    return x


def _values(x: object, name: str) -> None:
    """A dense tensor that holds values (not a meta or sparse one)."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device.type == "meta" or x.layout != torch.strided or x.is_quantized:
        raise InputError(f"{name} must be a dense tensor with values, got {x.dtype} {x.layout} on {x.device}")


def finite(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Audio [B, C, N] without NaN or infinity, which would spread to all later frames, and which rows had any, [B].

    On a CPU it raises InputError instead, and the second is None. On a GPU, which would have to be waited for, such
    samples become 0.
    """
    if torch.compiler.is_compiling() or not x.numel():
        return x, None
    if not x.is_cpu:
        known = x.nan_to_num(0.0, 0.0, 0.0)
        return known, (known != x).flatten(1).any(dim=1)
    # without a tensor of x's size: an hour of audio is 345 MB
    if not all(map(math.isfinite, map(float, x.detach().aminmax()))):
        bad = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise InputError(f"audio must be finite, got {x[tuple(bad)].item()} at {bad}")
    return x, None


def codes(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, K, T] integers -> int64."""
    _values(x, "codes")
    if x.dim() != 3 or x.shape[0] == 0:
        raise InputError(f"codes must be [batch, codebooks, frames], got {tuple(x.shape)}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"codes must be integers, got {x.dtype}")
    _count_in_range(x.shape[1], config)
    return x.long()


def code_range(x: Tensor, config: AnyConfig, ignored: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Codes [B, K, T] in [0, codebook_size), and which rows had others, [B].

    Where `ignored` [B, T] is True they may be anything and become 0. On a CPU it raises InputError for others, and the
    second is None. On a GPU, which would have to be waited for, they become the nearest code.
    """
    if ignored is not None:
        if ignored.shape != (x.shape[0], x.shape[2]):
            raise InputError(
                f"padding_mask must be [batch, frames] = {(x.shape[0], x.shape[2])}, got {tuple(ignored.shape)}"
            )
        x = torch.where(ignored[:, None].to(x.device), 0, x)
    if not x.numel() or torch.compiler.is_compiling():
        return x, None
    if not x.is_cpu:
        known = x.clamp(0, config.codebook_size - 1)
        return known, (known != x).flatten(1).any(dim=1)
    low, high = (value.item() for value in x.aminmax())
    if low < 0 or high >= config.codebook_size:
        worst = low if low < 0 else high
        hint = "; -1 marks no frame: pass padding_mask=mimi.frame_mask(...)" if low == -1 else ""
        raise InputError(f"codes must lie in [0, {config.codebook_size}), got {worst}{hint}")
    return x, None


def codebook_count(count: object, config: AnyConfig) -> int:
    """A number of codebooks, at least the semantic ones and at most all."""
    if type(count) is not int and (isinstance(count, bool) or not isinstance(count, Integral)):
        least, most = config.num_semantic_quantizers, config.num_quantizers
        raise InputError(f"the number of codebooks must be an integer from {least} to {most}, got {shown(count)}")
    _count_in_range(int(count), config)
    return int(count)


def _count_in_range(count: int, config: AnyConfig) -> None:
    least, most = config.num_semantic_quantizers, config.num_quantizers
    if not most:
        raise no_codes()
    if not least <= count <= most:
        raise InputError(f"the number of codebooks must be from {least} to {most}, got {count}")


def no_codes() -> InputError:
    """What to raise where a codec of continuous latents is asked for codes."""
    return InputError("this codec has continuous latents and no codes: use encode_to_latent and decode_latent")


def latents(x: Tensor, config: AnyConfig) -> Tensor:
    """[B, hidden_size, T] floating point."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] != config.hidden_size or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"latents must be floating point [batch, {config.hidden_size}, frames], got {got}")
    _values(x, "latents")
    return x


def streamable(config: AnyConfig) -> None:
    if not config.streamable:
        raise InputError(config.not_streamable_because)


def last_frame(way: object) -> None:
    if not isinstance(way, str) or way not in ("waveform", "layers"):
        raise InputError(f"last_frame must be 'waveform' or 'layers', got {shown(way)}")


def is_state(state: object) -> StreamState:
    if not isinstance(state, StreamState):
        raise InputError(f"state must come from new_state(), got {type(state).__name__}")
    return state


def state(state: StreamState, shape: tuple[int, ...], model: Codec) -> None:
    """Raise InputError unless the state has this shape and the model's device, dtype and configuration."""
    pending, device, dtype, config = is_state(state).pending, model.device, model.dtype, model.config
    if tuple(pending.shape) != shape:
        raise InputError(
            f"the state is for {pending.shape[0]} streams of frames {tuple(pending.shape[1:])}, got {shape}"
        )
    if pending.device != device or pending.dtype != dtype:
        raise InputError(
            f"the state is {pending.dtype} on {pending.device}, the model {dtype} on {device}: make a new_state()"
        )
    if state.config is not config and state.config is not None and state.config != config:
        raise InputError("the state is for a model of another configuration: make a new_state()")


def batch_size(count: object) -> int:
    """A number of streams."""
    if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= int(count) <= MOST_STREAMS:
        raise InputError(f"batch_size must be an integer from 1 to {MOST_STREAMS}, got {shown(count)}")
    return int(count)


def config(config: object, kind: type[Config]) -> Config:
    """A configuration of this class; the default one for None."""
    if config is not None and not isinstance(config, kind):
        raise InputError(f"config must be a {kind.__name__}, got {type(config).__name__}")
    return kind() if config is None else config


def dtype(dtype: object) -> torch.dtype:
    """A dtype that a model can compute in."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {shown(dtype)}")
    return dtype


def device(device: object) -> torch.device:
    """A device that this machine has."""
    found = device_type(device)
    if found.type == "cpu":
        return found
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != found.type:
        there = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise InputError(f"device {str(device)!r} was asked for, and PyTorch finds only {there} on this machine")
    if (found.index or 0) >= torch.accelerator.device_count():
        raise InputError(f"device {str(device)!r} was asked for, and there are {torch.accelerator.device_count()}")
    return found


def device_type(device: object) -> torch.device:
    """A device by its name, whether or not this machine has it."""
    if isinstance(device, str | torch.device):
        try:
            return torch.device(device)
        except (RuntimeError, ValueError):
            pass
    raise InputError(f"device must be cpu, cuda, cuda:1..., got {shown(device)}")


def has_part(part: nn.Module | None, name: str, method: str) -> None:
    if part is None:
        raise InputError(f"{method} needs the {name}, which this model was made without")
