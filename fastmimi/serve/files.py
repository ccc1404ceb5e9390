"""Whole files through a stream of the pool, beside the live ones: a file takes one frame of a tick, as they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.weights import fingerprint
from ..errors import InputError
from ..io.audio import AudioWriter, probe, read_blocks
from ..io.tokens import Tokens
from .pool import StreamPool
from .stream import Stream, StreamFull

WAIT_S = 1.0  # for results, before the stream is looked at again


def encode(pool: StreamPool, path: Path, model: str, num_codebooks: int | None, most_s: float) -> Tokens:
    """The codes of an audio file. Raises InputError for a file that is none or too long, PoolFull, StreamFailed."""
    codec = pool.codec
    file, length, parts = probe(path), 0, list[Tensor]()
    _check_duration(file.duration, most_s)
    with _opened(pool, "encode", num_codebooks) as (stream, results):
        for block in read_blocks(file, codec.sample_rate, codec.config.audio_channels):
            length += len(block)
            for some in torch.from_numpy(np.ascontiguousarray(block.T)).split(codec.sample_rate // 2, dim=-1):
                _push(stream.push_audio, some, results)
                parts.append(stream.read_codes())
        stream.finish()
        while not stream.done:
            results.wait(WAIT_S)
            results.clear()
            parts.append(stream.read_codes())
        count = stream.num_codebooks
    codes = torch.cat([part for part in parts if part.shape[-1]] or [torch.zeros(count, 0, dtype=torch.int64)], dim=-1)
    return Tokens(
        codes.to(torch.int32).numpy(), codebook_size=codec.config.codebook_size, sample_rate=codec.sample_rate,
        frame_rate=codec.frame_rate, frame_size=codec.frame_size, length=length, fingerprint=fingerprint(codec),
        model=model, packed=False,
    )  # fmt: skip


def decode(pool: StreamPool, path: Path, out: Path, most_s: float) -> None:
    """A token file to a WAV file. Raises as `encode` does, InputError also for codes of another model."""
    codec, tokens = pool.codec, Tokens.load(path)
    _check_duration(tokens.duration, most_s)
    if tokens.fingerprint != (own := fingerprint(codec)):
        raise InputError(
            f"these codes were made with {tokens.model} (fingerprint {tokens.fingerprint}), and the server has other "
            f"weights (fingerprint {own})"
        )
    codes, left = torch.from_numpy(tokens.codes.astype(np.int64)), tokens.length
    channels = codec.config.audio_channels
    with _opened(pool, "decode", None) as (stream, results), \
            AudioWriter(out, ("WAV", "PCM_16"), codec.sample_rate, channels) as writer:  # fmt: skip

        def write() -> None:
            nonlocal left
            block = stream.read_audio().numpy().T[:left]
            left -= len(block)
            if len(block):
                writer.write(block)

        for some in codes.split(pool.frames_per_tick, dim=1):
            _push(stream.push_codes, some, results)
            write()
        stream.finish()
        while not stream.done:
            results.wait(WAIT_S)
            results.clear()
            write()


def _check_duration(seconds: float, most_s: float) -> None:
    if seconds > most_s:
        raise InputError(f"a file may hold {most_s:g} s of audio at most, got {seconds:.1f} s")


@contextmanager
def _opened(pool: StreamPool, direction: str, num_codebooks: int | None) -> Iterator[tuple[Stream, threading.Event]]:
    """A stream, and an event that is set when it has results."""
    with pool.open(direction, num_codebooks=num_codebooks) as stream:
        results = threading.Event()
        stream.on_results = lambda _: results.set()
        yield stream, results


def _push(push: Callable[[Any], None], x: Tensor, results: threading.Event) -> None:
    while True:
        results.clear()
        try:
            return push(x)
        except StreamFull:
            results.wait(WAIT_S)
