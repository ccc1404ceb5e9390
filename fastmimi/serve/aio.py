"""Streams of a pool in asyncio: pushing waits for space, results are iterated over as ticks deliver them.

async with AsyncStreamPool(pool) as streams, streams.open("encode") as stream:
    await stream.push_audio(chunk)
    await stream.finish()
    async for codes in stream:  # [K, T]
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from torch import Tensor

from .pool import StreamPool
from .stream import Stream, StreamFull

WAIT_S = 0.05  # for space that another stream's tick may have made


class AsyncStream:
    """A stream of `AsyncStreamPool.open`. Iterating gives codes if it encodes, else audio."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self._results, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake(_: Stream) -> None:
            loop.call_soon_threadsafe(self._results.set)

        stream.on_results = wake

    async def push_audio(self, audio: Any) -> None:
        """As `Stream.push_audio`, but waits where that raises StreamFull."""
        await self._when_there_is_space(self.stream.push_audio, audio)

    async def push_codes(self, codes: Any) -> None:
        """As `Stream.push_codes`, but waits where that raises StreamFull."""
        await self._when_there_is_space(self.stream.push_codes, codes)

    async def finish(self) -> None:
        """End the input; iterations end when all results were read."""
        self.stream.finish()
        self._results.set()

    def codes(self) -> AsyncIterator[Tensor]:
        """Codes [K, T] as they come, T at least 1, until the stream is done. Raises StreamFailed."""
        return self._iterate(self.stream.read_codes)

    def audio(self) -> AsyncIterator[Tensor]:
        """Audio [channels, N] as it comes, N at least a frame, until the stream is done. Raises StreamFailed."""
        return self._iterate(self.stream.read_audio)

    def __aiter__(self) -> AsyncIterator[Tensor]:
        return self.codes() if "encode" in self.stream.directions else self.audio()

    async def _iterate(self, read: Callable[[], Tensor]) -> AsyncIterator[Tensor]:
        while True:
            ended = self.stream.ended  # asked before reading: then nothing comes after what is read
            if (found := read()).shape[-1]:
                yield found
            elif ended:
                return
            else:
                await self._results.wait()
                self._results.clear()

    async def _when_there_is_space(self, push: Callable[[Any], None], x: Any) -> None:
        while not self._pushed(push, x):
            await asyncio.sleep(WAIT_S)

    def _pushed(self, push: Callable[[Any], None], x: Any) -> bool:
        try:
            push(x)
        except StreamFull:
            if self.stream.queued == 0 and not self.stream.pool.stats().waiting_frames:
                raise  # more than ever fits
            return False
        return True


class AsyncStreamPool:
    """A pool whose ticks run in its own thread while this context is entered."""

    def __init__(self, pool: StreamPool):
        self.pool = pool

    async def __aenter__(self) -> AsyncStreamPool:
        self.pool.start()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.pool.stop)

    @asynccontextmanager
    async def open(
        self, directions: str | tuple[str, ...] | None = None, *, num_codebooks: int | None = None
    ) -> AsyncIterator[AsyncStream]:
        """As `StreamPool.open`; the stream is closed at the end of the context. Raises PoolFull."""
        with self.pool.open(directions, num_codebooks=num_codebooks) as stream:
            yield AsyncStream(stream)
