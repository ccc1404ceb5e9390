"""Stream: the handle of one stream of a pool, with its queues and results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models import checks
from ..runtime.openmp import PARALLEL_FROM
from . import queues
from .queues import AudioQueue

if TYPE_CHECKING:
    from .pool import StreamPool


class StreamFull(RuntimeError):
    """A stream, or the pool, has as much input waiting as it may; some is taken at the next tick."""


class StreamClosed(RuntimeError):
    """The stream takes no more input: it was finished or closed."""


class StreamFailed(RuntimeError):
    """A tick failed; the streams of its batch are lost, and `__cause__` says why."""


class Stream:
    """One stream of a pool, made by `StreamPool.open`; as a context manager it is closed at the end."""

    def __init__(self, pool: StreamPool, slot: int, directions: tuple[str, ...], num_codebooks: int):
        self.pool, self.slot, self.directions = pool, slot, directions
        self._num_codebooks = num_codebooks
        self.on_results: Callable[[Stream], None] | None = None  # called in the ticking thread
        self.error: BaseException | None = None
        self._audio, self._codes = AudioQueue(), deque[Tensor]()
        self._coded: deque[Tensor] = deque()  # results: [K, T]
        self._heard: deque[Tensor] = deque()  # [C, N]
        self._unread = 0  # frames
        self._finished = self._ended = self._stepping = self._restarts = False

    @property
    def num_codebooks(self) -> int:
        """How many codebooks of each frame are read; may be changed between frames."""
        return self._num_codebooks

    @num_codebooks.setter
    def num_codebooks(self, count: int) -> None:
        count = checks.codebook_count(count, self.pool.codec.config)
        if count > self.pool.slots.num_codebooks:
            raise InputError(f"the pool encodes {self.pool.slots.num_codebooks} codebooks, got {count}")
        self._num_codebooks = count

    def push_audio(self, audio: Any) -> None:
        """Append samples [N] or [channels, N] at the codec's rate, float or int16, of any length.

        Raises InputError for a wrong shape or dtype and for NaN or infinity, StreamFull and StreamClosed; nothing has
        been taken then.
        """
        x = queues.samples(audio, self.pool.codec.config)
        if x.numel() >= PARALLEL_FROM:
            self.pool._leave_computing_to_thread()
        with self.pool._lock:
            self.pool._admit(self, "encode", x.shape[-1])
            self._audio.push(x)
        self.pool._wake()

    def push_codes(self, codes: Any) -> None:
        """Append frames of codes [K] or [K, T], any integers; K is the number of codebooks and may change.

        Raises as `push_audio` does, InputError also for codes out of range.
        """
        frames = queues.frames(codes, self.pool.codec.config)
        with self.pool._lock:
            self.pool._admit(self, "decode", len(frames) * self.pool.frame_size)
            self._codes.extend(frames)
        self.pool._wake()

    def flush(self) -> None:
        """Fill an incomplete frame with zeros, so that it is encoded; the stream goes on."""
        with self.pool._lock:
            self.pool._queued += self._audio.complete(self.pool.frame_size)
        self.pool._wake()

    def finish(self) -> None:
        """End the input, flushed. The slot is free again when all is done."""
        with self.pool._lock:
            if not self._finished and not self._ended:
                self._finished = True
                self.flush()
                self.pool._end_if_done(self)

    def reset(self) -> None:
        """Start anew in the same slot: what waits and what was not read is dropped. Raises StreamClosed."""
        with self.pool._lock:
            self.pool._check_open(self)
            self.pool._drop(self)
            if self._stepping:
                self._restarts = True  # after the step, whose result is dropped
            else:
                self.pool.slots.reset([self.slot])
                self.pool._leave_computing_to_thread()

    def close(self) -> None:
        """End the stream now: what waits is dropped, results are gone, the slot is free again."""
        with self.pool._lock:
            self.pool._drop(self)
            self.pool._end(self)

    def read_codes(self) -> Tensor:
        """The codes [K, T] int64 of the frames encoded since the last call; T may be 0. Raises StreamFailed.

        Where `num_codebooks` was changed, the frames up to the change; the next call returns those after it.
        """
        found = self._read(self._coded)
        return torch.cat(found, dim=-1) if found else torch.empty(self.num_codebooks, 0, dtype=torch.int64)

    def read_audio(self) -> Tensor:
        """The audio [channels, N] fp32 of the frames decoded since the last call; N may be 0. Raises StreamFailed."""
        found = self._read(self._heard)
        return torch.cat(found, dim=-1) if found else torch.empty(self.pool.codec.config.audio_channels, 0)

    def _read(self, results: deque[Tensor]) -> list[Tensor]:
        with self.pool._lock:
            found: list[Tensor] = []
            while results and (not found or len(results[0]) == len(found[0])):
                found.append(results.popleft())
            size = self.pool.frame_size if results is self._heard else 1
            self._unread -= sum(x.shape[-1] // size for x in found)
        if not found and self.error is not None:
            raise StreamFailed(f"the stream failed: {self.error}") from self.error
        if found:  # a stream with too many unread results may be stepped again
            self.pool._wake()
        return found

    @property
    def done(self) -> bool:
        """Whether the stream has ended and every result was read."""
        return self._ended and not self._coded and not self._heard

    @property
    def idle(self) -> bool:
        """Whether all whole frames of input have become results."""
        with self.pool._lock:  # a tick takes input and marks the stream in two steps
            return not self._stepping and not any(map(self.waiting, self.directions))

    @property
    def ended(self) -> bool:
        """Whether no more results will come."""
        return self._ended

    @property
    def queued(self) -> int:
        """Samples of input that wait, and those of the frames of codes that do."""
        return self._audio.length + len(self._codes) * self.pool.frame_size

    def waiting(self, direction: str) -> int:
        """Whole frames of input that wait for a tick."""
        return self._audio.length // self.pool.frame_size if direction == "encode" else len(self._codes)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
