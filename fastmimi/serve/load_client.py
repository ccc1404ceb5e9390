"""The clients of a load test: each sends in real time what was packed before, and sends codes back when they come.

Between two messages there is no work on samples or tensors, so that one process bears thousands of clients.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from websockets.exceptions import WebSocketException

from ..io.audio import probe, read_blocks
from . import protocol
from .client import AsyncClient, AsyncStream, ServerError
from .load_figures import Frames, Playback, quantiles_ms
from .protocol import Direction, Ready

PLANS = 64  # at most: clients share them, and begin at different chunks
LONGEST_AUDIO_S = 60
CONNECTING = 32  # clients that connect at the same time
AFTER_S = 5.0  # for results, after the end


@dataclass(frozen=True)
class Plan:
    """Messages that follow each other in a circle, and how many samples each stands for."""

    messages: list[bytes]
    samples: list[int]


@dataclass(frozen=True)
class Load:
    """What the clients of a level do. chunk_s: of the shortest and the longest chunk of audio."""

    url: str
    token: str | None
    directions: tuple[Direction, ...]
    num_codebooks: int | None
    seconds: float
    chunk_s: tuple[float, float]
    playout_s: float
    seed: int

    @property
    def buffer_s(self) -> float:
        """What a client buffers before it plays: its longest chunk, for which its own audio waits, and the playout."""
        return self.playout_s + (self.chunk_s[1] if "encode" in self.directions else 0.0)


def audio_plans(path: Path, ready: Ready, load: Load, count: int) -> list[Plan]:
    """The audio of a file as chunks of random lengths, in a circle from a random sample on, in so many ways."""
    file, rate = probe(path), ready.sample_rate
    blocks, length = [], 0
    for block in read_blocks(file, rate):
        blocks.append(block[:, 0])
        length += len(block)
        if length >= LONGEST_AUDIO_S * rate:
            break
    x = (np.concatenate(blocks)[: LONGEST_AUDIO_S * rate] * 32768).round().clip(-32768, 32767).astype("<i2")
    random, plans = np.random.default_rng(load.seed), []
    for _ in range(count):
        circle, samples = np.roll(x, -int(random.integers(len(x)))), list[int]()
        while (left := len(x) - sum(samples)) > 0:
            samples.append(min(left, max(1, round(random.uniform(*load.chunk_s) * rate))))
        chunks = np.split(circle, np.cumsum(samples)[:-1])
        plans.append(Plan([protocol.pack(protocol.Audio(c.tobytes() * ready.channels)) for c in chunks], samples))
    return plans


def codes_plans(ready: Ready, load: Load, count: int) -> list[Plan]:
    """Random codes, a frame in a message, for clients that only decode."""
    random, number = np.random.default_rng(load.seed), load.num_codebooks or ready.num_codebooks
    codes = random.integers(ready.codebook_size, size=(count, 100, number)).astype("<i2")
    return [
        Plan([protocol.pack(protocol.Codes(frame.tobytes(), number)) for frame in some], [ready.frame_size] * 100)
        for some in codes
    ]


class Start:
    """Lets all clients begin at `time` once each is connected, or has failed."""

    def __init__(self, clients: int):
        self._missing, self._event, self.time = clients, asyncio.Event(), 0.0

    def arrived(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.time = time.perf_counter()
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


class LoadClient:
    """One client. phase_s: how much later than the others it begins. first: the chunk of the plan that it begins with.

    After `run`: refused or error, a sentence, if it failed; and its figures.
    """

    def __init__(self, plan: Plan, ready: Ready, load: Load, phase_s: float, first: int, keep_codes: bool = False):
        self.plan, self.ready, self.load, self.phase_s, self.first = plan, ready, load, phase_s, first
        self.frames, self.playback = Frames(ready.frame_size), Playback(ready.sample_rate, load.buffer_s)
        self.late = array("d")  # seconds by which chunks were sent later than they should have been
        self.refused = self.error = ""
        self.codes: list[bytes] | None = [] if keep_codes else None
        self.chunks_sent = 0
        self._all_sent = False

    @property
    def lost(self) -> int:
        """Frames of which some result never came; of a client that failed these are not counted."""
        if self.refused or self.error:
            return 0
        return self.frames.count - self._complete

    @property
    def _complete(self) -> int:
        """Frames that came back in all directions."""
        directions = self.load.directions
        counts = [len(self.frames.codes)] * ("encode" in directions) + [len(self.frames.audio)] * (
            "decode" in directions
        )
        return min(counts)

    async def run(self, start: Start, connecting: asyncio.Semaphore) -> None:
        load, connected = self.load, False
        try:
            async with AsyncExitStack() as stack:
                opened = AsyncClient(load.url, load.token).stream(
                    load.directions, num_codebooks=load.num_codebooks, format="s16"
                )
                try:
                    async with connecting:
                        stream = await stack.enter_async_context(opened)
                    connected = True
                finally:
                    start.arrived()
                await start.wait()
                await self._converse(stream, start.time + self.phase_s)
        except (ServerError, WebSocketException, OSError, ValueError, asyncio.TimeoutError) as error:
            code = error.code if isinstance(error, ServerError) else type(error).__name__
            self.error, self.refused = (f"{code}: {error}", "") if connected else ("", f"{code}: {error}")

    async def _converse(self, stream: AsyncStream, begin: float) -> None:
        """Send and receive; returns when all frames came back, or AFTER_S after the last was sent."""
        tasks = sending, receiving = [
            asyncio.ensure_future(self._send(stream, begin)), asyncio.ensure_future(self._receive(stream))
        ]  # fmt: skip
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and self._complete < self.frames.count:
                await asyncio.wait([receiving], timeout=AFTER_S)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(receiving, sending, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error

    async def _send(self, stream: AsyncStream, begin: float) -> None:
        plan, at, samples, rate = self.plan, self.first, 0, self.ready.sample_rate
        most = self.load.seconds * rate
        while samples < most:
            samples += plan.samples[at]
            due = begin + samples / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            now = time.perf_counter()
            self.late.append(now - due)
            self.frames.sent(plan.samples[at], now)
            await stream.send(plan.messages[at])
            self.chunks_sent += 1
            at = (at + 1) % len(plan.messages)
        self._all_sent = True

    async def _receive(self, stream: AsyncStream) -> None:
        duplex, bytes_per_sample = len(self.load.directions) == 2, 2 * self.ready.channels
        while not (self._all_sent and self._complete == self.frames.count):
            match await stream.receive():
                case protocol.Codes() as codes:
                    self.frames.codes_came(len(codes.codes) // (2 * codes.num_codebooks), time.perf_counter())
                    if self.codes is not None:
                        self.codes.append(codes.codes)
                    if duplex:
                        await stream.send(protocol.pack(codes))
                case protocol.Audio() as audio:
                    now, samples = time.perf_counter(), len(audio.samples) // bytes_per_sample
                    self.playback.received(samples, now)
                    self.frames.audio_came(samples, now)


async def run_clients(clients: list[LoadClient]) -> None:
    start, connecting = Start(len(clients)), asyncio.Semaphore(CONNECTING)
    await asyncio.gather(*(client.run(start, connecting) for client in clients))


def made_clients(count: int, plans: list[Plan], ready: Ready, load: Load) -> list[LoadClient]:
    """Clients with random phases within a frame."""
    random, frame_s = np.random.default_rng([load.seed, count]), 1 / ready.frame_rate
    return [
        LoadClient(plan, ready, load, random.uniform(0, frame_s), int(random.integers(len(plan.messages))))
        for plan in (plans[i % len(plans)] for i in range(count))
    ]


def figures(clients: list[LoadClient], cpu_s: float, wall_s: float) -> dict[str, object]:
    """A level's results, as they stand in the JSON file; times in ms."""

    def joined(parts: list[array[float]]) -> array[float]:
        whole = array("d")
        for part in parts:
            whole.extend(part)
        return whole

    frames = [client.frames for client in clients]
    return {
        "clients": len(clients),
        "failed": sum(bool(c.refused or c.error or c.lost) for c in clients),
        "refused": dict(Counter(c.refused for c in clients if c.refused)),
        "errors": dict(Counter(c.error for c in clients if c.error)),
        "frames_sent": sum(f.count for f in frames),
        "frames_lost": sum(c.lost for c in clients),
        "codes_ms": quantiles_ms(joined([f.codes for f in frames])),
        "audio_ms": quantiles_ms(joined([f.audio for f in frames])),
        "underruns": sum(c.playback.underruns for c in clients),
        "halted_s": round(sum(c.playback.halted_s for c in clients), 3),
        "sent_late_ms": quantiles_ms(joined([c.late for c in clients])),
        "generator_cpu": round(cpu_s / wall_s, 3),
    }
