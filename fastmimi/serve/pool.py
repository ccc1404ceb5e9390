"""StreamPool: streams that come and go, each with its queues; one tick steps all of them that have whole frames.

    push_audio ->  samples  -> tick -> codes  -> read_codes
    push_codes ->   codes   -> tick -> audio  -> read_audio

A tick takes one frame of each stream that has any, as one batch each way: so it is as short as it can be, and a stream
that is behind catches up by ticks that follow one another, which hold up nobody. Only a stream that is alone in a batch
takes up to `frames_per_tick` frames at once.

All methods may be called from any thread. Ticks run one at a time, in the thread that calls `step` or in the pool's own
(`start`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from ..errors import InputError, shown
from ..models.codec import Codec
from ..runtime.openmp import end_workers
from .queues import AudioQueue
from .slots import DIRECTIONS, SlotPool
from .stream import Stream, StreamClosed, StreamFailed, StreamFull

_log = logging.getLogger(__name__)
TICKS_KEPT = 1000  # for the quantiles of stats


@dataclass(frozen=True)
class Limits:
    """How much may wait, in seconds of audio: input of a stream, input of all, and unread results of a stream.

    A stream with more unread results is not stepped until some are read.
    """

    stream_s: float = 4.0
    pool_s: float = 256.0
    unread_s: float = 60.0


@dataclass(frozen=True)
class PoolStats:
    """A moment of a pool. Times are of the last 1,000 ticks that had work, in ms; frames are of 80 ms."""

    capacity: int
    open: int
    free: int
    quarantined: int
    waiting_frames: int
    encoded_frames: int
    decoded_frames: int
    failed_streams: int
    ticks: int
    tick_p50_ms: float
    tick_p99_ms: float
    real_time_factor: float  # seconds of audio that were encoded or decoded, per second in ticks


@dataclass
class _Batch:
    """Streams that take part in a step with the same number of frames, and their input."""

    direction: str
    frames: int
    streams: list[Stream]
    audio: list[Tensor] = field(default_factory=list)  # [C, frames * frame_size] each
    codes: list[list[Tensor]] = field(default_factory=list)  # frames [K] of each stream


class StreamPool:
    """Up to `capacity` streams of one codec; each gets exactly what it would get alone.

    Args:
        codec: a model; it must not change while the pool is in use.
        capacity: streams that may be open; each takes `slots.bytes_per_slot` of memory.
        directions: "encode", "decode" or both.
        num_codebooks: codebooks that are encoded; a stream may ask for fewer. By default those of the codec.
        frames_per_tick: frames of a stream in one tick, at most, where it is alone.
        limits: how much may wait.
        warm_up: record steps now, so that no stream waits for it; `progress` is called with (done, of how many).
    """

    def __init__(
        self, codec: Codec, capacity: int = 64, *, directions: tuple[str, ...] = DIRECTIONS,
        num_codebooks: int | None = None, frames_per_tick: int = 4, limits: Limits | None = None, warm_up: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ):  # fmt: skip
        if type(frames_per_tick) is not int or frames_per_tick < 1:
            raise InputError(f"frames_per_tick must be a positive integer, got {shown(frames_per_tick)}")
        self.codec, self.limits, self.frames_per_tick = codec, limits or Limits(), frames_per_tick
        self.frame_size = codec.frame_size  # samples; the codec works it out anew each time
        self.slots = SlotPool(codec, capacity, directions=directions, num_codebooks=num_codebooks)
        self.directions = directions
        if warm_up:
            self.slots.warm_up(progress)
        self._streams: dict[int, Stream] = {}  # open ones by slot
        self._lock = threading.RLock()  # of queues and slots; never held during a step
        self._ticking = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._frames = dict.fromkeys(DIRECTIONS, 0)
        self._failed = self._ticks = 0
        self._queued = 0  # samples of audio, or of frames of codes, that wait in all streams
        self._seconds, self._times = 0.0, deque[float](maxlen=TICKS_KEPT)

    # Streams

    def open(self, directions: str | tuple[str, ...] | None = None, *, num_codebooks: int | None = None) -> Stream:
        """A new stream that encodes, decodes or both (the default); raises PoolFull if there is no free slot."""
        wanted = self.directions if directions is None else (directions,) if isinstance(directions, str) else directions
        if not wanted or not set(wanted) <= set(self.directions):
            raise InputError(f"directions must be among {', '.join(self.directions)}, got {shown(wanted)}")
        with self._lock:
            count = self.slots.num_codebooks if num_codebooks is None else num_codebooks
            stream = Stream(self, -1, tuple(wanted), self.slots.num_codebooks)
            stream.num_codebooks = count
            stream.slot = self.slots.acquire()
            self._streams[stream.slot] = stream
        return stream

    def _admit(self, stream: Stream, direction: str, samples: int) -> None:
        """Raise unless the stream may be given so many more samples, or frames of codes of as many."""
        self._check_open(stream)
        if direction not in stream.directions:
            raise InputError(f"this stream does not {direction}: it was opened to {' and '.join(stream.directions)}")
        for queued, most, where in (
            (stream.queued, self.limits.stream_s, "stream"), (self._queued, self.limits.pool_s, "pool"),
        ):  # fmt: skip
            if (seconds := (queued + samples) / self.codec.sample_rate) > most:
                raise StreamFull(f"{seconds:.1f} s would wait in the {where}, at most {most:g} s may")
        self._queued += samples

    def _check_open(self, stream: Stream) -> None:
        if stream.error is not None:
            raise StreamFailed(f"the stream failed: {stream.error}") from stream.error
        if stream._ended or stream._finished:
            raise StreamClosed("the stream has ended" if stream._ended else "the stream is finished: no more input")

    def _drop(self, stream: Stream) -> None:
        """Forget the input that waits and the results that were not read."""
        self._queued -= stream.queued
        stream._audio, stream._codes = AudioQueue(), deque()
        stream._coded.clear()
        stream._heard.clear()
        stream._unread = 0

    def _end_if_done(self, stream: Stream) -> None:
        if stream._finished and not any(map(stream.waiting, DIRECTIONS)) and not stream._stepping:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        """No more of this stream; its slot is released at once, or after the step that it is in."""
        if not stream._ended:
            stream._ended = True
            self._queued -= stream.queued
            stream._audio, stream._codes = AudioQueue(), deque()
        if not stream._stepping and self._streams.get(stream.slot) is stream:
            del self._streams[stream.slot]
            try:
                self.slots.release(stream.slot)
            except Exception:
                _log.exception("slot %d cannot be reset and is not used any more", stream.slot)
            self._leave_computing_to_thread()

    # Ticks

    def step(self) -> int:
        """Run one tick: how many frames it encoded and decoded. Results are then in the streams.

        An exception in a step ends the streams of its batch (`stream.error`) and no others.
        """
        with self._ticking:
            start, frames = time.perf_counter(), 0
            for direction in self.directions:
                if (batch := self._batch(direction)) is not None:
                    frames += batch.frames * len(batch.streams)
                    self._run(batch)
            if frames:
                elapsed = time.perf_counter() - start
                self._ticks += 1
                self._seconds += elapsed
                self._times.append(elapsed)
            return frames

    def _batch(self, direction: str) -> _Batch | None:
        """Take the input of a step out of the queues; None if there is none."""
        with self._lock:
            most_unread = self.limits.unread_s * self.codec.frame_rate
            ready = [s for s in self._streams.values() if s.waiting(direction) and s._unread < most_unread]
            if not ready:
                return None
            frames = min(ready[0].waiting(direction), self.frames_per_tick) if len(ready) == 1 else 1
            batch = _Batch(direction, frames, ready)
            for stream in ready:
                stream._stepping = True
                self._queued -= frames * self.frame_size
                if direction == "encode":
                    batch.audio.append(stream._audio.take(frames * self.frame_size))
                else:
                    batch.codes.append([stream._codes.popleft() for _ in range(frames)])
            return batch

    def _run(self, batch: _Batch) -> None:
        """Step a batch and hand each stream its result."""
        try:
            slots = [stream.slot for stream in batch.streams]
            results = self._encoded(batch, slots) if batch.direction == "encode" else self._decoded(batch, slots)
            results = results.cpu()
        except BaseException as error:
            self._fail(batch, error)
            if not isinstance(error, Exception):  # such as KeyboardInterrupt
                raise
            _log.exception("a step failed: %d streams, %d frames", len(batch.streams), batch.frames)
            return
        with self._lock:
            self._frames[batch.direction] += batch.frames * len(batch.streams)
            for stream, result in zip(batch.streams, results, strict=True):
                stream._stepping = False
                if stream._ended:  # closed in the meantime
                    self._end(stream)
                    continue
                if stream._restarts:
                    self._restart(stream)
                    continue
                if batch.direction == "encode":
                    stream._coded.append(result[: stream.num_codebooks].clone())
                else:
                    stream._heard.append(result.float().clone())
                stream._unread += batch.frames
                self._end_if_done(stream)
        self._notify(batch)

    def _restart(self, stream: Stream) -> None:
        """Reset the slot of a stream after a step; a stream whose slot cannot be reset fails, and no other."""
        stream._restarts = False
        try:
            self.slots.reset([stream.slot])
        except Exception as error:
            stream.error = error
            self._failed += 1
            self._end(stream)
        else:
            self._end_if_done(stream)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        with self._lock:
            for stream in batch.streams:
                stream._stepping = False
                stream.error = stream.error or error
                self._failed += 1
                self._end(stream)
        self._notify(batch)

    def _notify(self, batch: _Batch) -> None:
        for stream in batch.streams:
            if stream.on_results is not None:
                try:
                    stream.on_results(stream)
                except Exception:
                    _log.exception("on_results of the stream in slot %d failed", stream.slot)

    def _encoded(self, batch: _Batch, slots: list[int]) -> Tensor:
        """Codes [n, K, frames], as many codebooks as the pool encodes."""
        return self.slots.step_encode(torch.stack(batch.audio), slots)

    def _decoded(self, batch: _Batch, slots: list[int]) -> Tensor:
        """Audio [n, channels, frames * frame_size]; by way of latents where numbers of codebooks differ."""
        counts = {len(frame) for frames in batch.codes for frame in frames}
        if len(counts) == 1:
            return self.slots.step_decode(torch.stack([torch.stack(frames, dim=1) for frames in batch.codes]), slots)
        config = self.codec.config
        latents = torch.empty(
            len(slots), config.hidden_size, batch.frames, device=self.codec.device, dtype=self.codec.dtype
        )
        for count in counts:
            at = [(i, t) for i, frames in enumerate(batch.codes) for t, f in enumerate(frames) if len(f) == count]
            rows, steps = (torch.tensor(index, device=self.codec.device) for index in zip(*at, strict=True))
            codes = torch.stack([batch.codes[i][t] for i, t in at])[..., None]
            latents[rows, :, steps] = self.codec.dequantize(codes)[..., 0]
        return self.slots.step_decode_latents(latents, slots)

    # The pool's own thread

    def start(self) -> None:
        """Run ticks in a thread, whenever there is work, until `stop`."""
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("the pool's thread is running")
            self._stopping = False
            end_workers()  # those that loading and recording have used
            self._thread = threading.Thread(target=self._ticks_of_thread, name="fastmimi stream pool", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after its present tick; streams stay open."""
        with self._lock:
            thread, self._stopping, self._thread = self._thread, True, None
            self._work.notify_all()
        if thread is not None:
            thread.join()

    def _leave_computing_to_thread(self) -> None:
        """After a computation in another thread than the pool's, if it has one."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            end_workers()

    def _ticks_of_thread(self) -> None:
        while not self._stopping:
            idle = self.step() == 0
            with self._work:
                if idle and not self._stopping and not self._has_work():
                    self._work.wait(timeout=1.0)

    def _has_work(self) -> bool:
        most_unread = self.limits.unread_s * self.codec.frame_rate
        return any(s.waiting(d) and s._unread < most_unread for s in self._streams.values() for d in self.directions)

    def _wake(self) -> None:
        if self._thread is not None:
            with self._work:
                self._work.notify_all()

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        for stream in list(self._streams.values()):
            stream.close()

    def stats(self) -> PoolStats:
        """What the pool does at the moment."""
        with self._lock:
            times = sorted(self._times) or [0.0]
            audio_s = sum(self._frames.values()) / self.codec.frame_rate
            return PoolStats(
                capacity=self.slots.capacity, open=len(self._streams), free=self.slots.free,
                quarantined=self.slots.quarantined,
                waiting_frames=sum(s.waiting(d) for s in self._streams.values() for d in DIRECTIONS),
                encoded_frames=self._frames["encode"], decoded_frames=self._frames["decode"],
                failed_streams=self._failed, ticks=self._ticks,
                tick_p50_ms=1e3 * times[len(times) // 2], tick_p99_ms=1e3 * times[int(0.99 * (len(times) - 1))],
                real_time_factor=audio_s / self._seconds if self._seconds else 0.0,
            )  # fmt: skip
