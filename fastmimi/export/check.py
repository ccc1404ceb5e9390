"""Compares an exported file with the model: codes are equal, audio to 1e-5 of its peak, whole and in any chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..devtools.testing import assert_same_codes, noise, relative_error
from ..models.codec import Codec
from .formats import Run, State
from .programs import Program

CHUNKS = (1, 1, 2, 3, 40, 1, 90, 1)  # frames: 11 s, beyond a context of 10 s
TOLERANCE = 1e-5  # of audio, relative to its peak


@torch.no_grad()
def check(traced: Program, run: Run, model: Codec) -> None:
    """Raise AssertionError unless the opened file computes what the `rounded` model does."""
    if traced.state:
        x = example(traced, model, 1, sum(CHUNKS))
        compare(traced, model, x, in_chunks(traced, run, x, CHUNKS, model.frame_size))
        return
    for batch, frames, missing in ((2, 3, 7), (1, 1, 0)):
        x = example(traced, model, batch, frames)
        x = x[..., : x.shape[-1] - missing] if traced.input.name == "audio" else x
        compare(traced, model, x, run(x, {})[0])


def example(traced: Program, model: Codec, batch: int, frames: int) -> Tensor:
    """Noise [B, C, N], or any codes [B, K, T]."""
    if traced.input.name == "audio":
        return noise(batch, model.config.audio_channels, frames * model.frame_size)
    shape = (batch, model.num_codebooks, frames)
    return torch.randint(model.config.codebook_size, shape, generator=torch.Generator().manual_seed(0))


def compare(traced: Program, model: Codec, x: Tensor, y: Tensor) -> None:
    """The file's result for x, and the model's."""
    if traced.input.name == "audio":
        assert_same_codes(y, model.encode(x), model.encode_to_latent(x), model)
    else:
        error = relative_error(y, model.decode(x))
        assert error < TOLERANCE, f"{traced.name}: audio differs from the model's by {error:.1e} of the peak"


def in_chunks(traced: Program, run: Run, x: Tensor, chunks: tuple[int, ...], frame_size: int) -> Tensor:
    """The results of a step for consecutive chunks, in frames, of x: audio [B, C, N] or codes [B, K, T]."""
    unit = frame_size if traced.input.name == "audio" else 1
    state: State = {port.name: _zeros(port.shape, len(x), port.dtype) for port in traced.state}
    results = []
    for chunk in x.split([frames * unit for frames in chunks], dim=-1):
        y, state = run(chunk.contiguous(), state)
        results.append(y)
    return torch.cat(results, dim=-1)


def _zeros(shape: tuple[int | str, ...], batch: int, dtype: str) -> Tensor:
    return torch.zeros([batch if isinstance(size, str) else size for size in shape], dtype=getattr(torch, dtype))
