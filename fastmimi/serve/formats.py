"""Audio between a client and the codec: bytes in its format and at its rate, samples at the codec's."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from ..errors import InputError
from ..models.codec import Codec
from .protocol import Format, samples_of_bytes, samples_to_bytes

RATES = (8_000, 192_000)  # Hz, that clients may ask for


def checked_rate(rate: int | None, kind: Format, codec: Codec) -> int:
    """The rate of a client's audio; raises InputError for one that it cannot have."""
    if rate is None:
        return codec.sample_rate
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"sample_rate must be from {RATES[0]} to {RATES[1]} Hz, got {rate}")
    if kind == "opus" and rate != codec.sample_rate:
        raise InputError(f"opus is decoded at the codec's {codec.sample_rate} Hz; leave sample_rate out, got {rate}")
    return rate


class Incoming:
    """What a client sends, as samples [channels, n] at the codec's rate."""

    def __init__(self, kind: Format, rate: int, codec: Codec):
        self.kind, self.codec, self.channels = kind, codec, codec.config.audio_channels
        self._resampler = _resampler(rate, codec.sample_rate, self.channels)
        self._opus = _sphn(codec).OpusStreamReader(codec.sample_rate) if kind == "opus" else None

    def samples(self, data: bytes) -> Tensor:
        """Raises InputError for bytes that are no audio, and for NaN or infinite samples."""
        if self._opus is not None:
            try:
                pcm = self._opus.append_bytes(data)
            except ValueError as error:
                raise InputError(f"not a chunk of an Ogg Opus stream: {error}") from None
            return torch.from_numpy(np.array(pcm, np.float32).reshape(1, -1))
        audio = samples_of_bytes(data, self.kind, self.channels)
        bad = np.argwhere(~np.isfinite(audio.numpy()))  # PyTorch would use several threads, see runtime/openmp.py
        if len(bad):
            raise InputError(f"audio must be finite, got {audio[tuple(bad[0])].item()} at {bad[0].tolist()}")
        return audio if self._resampler is None else _resampled(self._resampler, audio)

    def rest(self) -> Tensor:
        """What the resampler still holds, at the end of an utterance; after it the next may begin."""
        if self._resampler is None:
            return torch.zeros(self.channels, 0)
        rest = _resampled(self._resampler, torch.zeros(self.channels, 0), last=True)
        self._resampler.clear()
        return rest


class Outgoing:
    """Samples [channels, n] at the codec's rate, as what a client receives."""

    def __init__(self, kind: Format, rate: int, codec: Codec):
        self.kind, self.channels = kind, codec.config.audio_channels
        self._resampler = _resampler(codec.sample_rate, rate, self.channels)
        self._opus = _sphn(codec).OpusStreamWriter(codec.sample_rate) if kind == "opus" else None

    def encoded(self, audio: Tensor) -> bytes:
        if self._opus is not None:
            return bytes(self._opus.append_pcm(audio[0].numpy()))
        return samples_to_bytes(audio if self._resampler is None else _resampled(self._resampler, audio), self.kind)

    def rest(self) -> bytes:
        """What the resampler still holds, at the end of an utterance; after it the next may begin."""
        if self._resampler is None:
            return b""
        rest = _resampled(self._resampler, torch.zeros(self.channels, 0), last=True)
        self._resampler.clear()
        return samples_to_bytes(rest, self.kind)


def _resampler(rate: int, to_rate: int, channels: int) -> Any:
    return None if rate == to_rate else soxr.ResampleStream(rate, to_rate, channels, dtype="float32")


def _resampled(resampler: Any, audio: Tensor, last: bool = False) -> Tensor:
    block = resampler.resample_chunk(np.ascontiguousarray(audio.numpy().T), last=last)
    return torch.from_numpy(np.ascontiguousarray(block.T))


def _sphn(codec: Codec) -> Any:
    if importlib.util.find_spec("sphn") is None:
        raise InputError("format 'opus' needs the package sphn on the server: pip install sphn")
    if codec.config.audio_channels != 1:
        raise InputError(f"format 'opus' is for one channel, the codec has {codec.config.audio_channels}")
    import sphn

    return sphn
