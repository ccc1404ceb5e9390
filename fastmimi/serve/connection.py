"""One WebSocket connection: messages of a client to its stream of the pool, and results back.

A reader and a writer run side by side. Where the stream has as much input waiting as it may, the reader stops reading,
and TCP makes the client wait; where the client does not read, the writer waits, then the pool no longer steps the
stream (`Limits.unread_s`). Neither reaches other streams.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from torch import Tensor

from ..errors import InputError
from . import protocol
from .formats import Incoming, Outgoing, checked_rate
from .pool import StreamPool
from .protocol import ErrorCode, Init, Message, Ready
from .slots import PoolFull
from .stream import Stream, StreamClosed, StreamFailed, StreamFull

_log = logging.getLogger(__name__)
CLOSE_CODES: dict[ErrorCode, int] = {  # of WebSocket (RFC 6455, section 7.4)
    "bad_message": 1008, "pool_full": 1013, "busy": 1013, "too_slow": 1008, "idle": 1008, "draining": 1012,
    "failed": 1011,
}  # fmt: skip
WAIT_S = 0.05  # for space in a stream's queue, if no result wakes the reader before


@dataclass(frozen=True)
class ConnectionLimits:
    """What one client may do.

    message_bytes: of one message. messages_per_s: more wait. bad_messages: after as many the connection is closed.
    idle_s: without a message. send_s: for a message to be taken. stalled_s: after as long without the receipt of what
    was sent, TCP resets the connection (Linux); until then what was sent before the end keeps its memory.
    """

    message_bytes: int = 1 << 20
    messages_per_s: int = 500
    bad_messages: int = 16
    idle_s: float = 60.0
    send_s: float = 10.0
    stalled_s: float = 60.0


class _Stop(Exception):
    """Ends the connection, with an Error for the client."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code: ErrorCode = code


class Connection:
    """A client's connection; `run` returns when it has ended and its slot is free."""

    def __init__(self, socket: WebSocket, pool: StreamPool, model: str, limits: ConnectionLimits):
        self.socket, self.pool, self.model, self.limits = socket, pool, model, limits
        self._results, self._space, self._flushed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._flushing = False
        self._bad = self._sent_frames = self._messages = 0
        self._second = 0.0
        self._sending = 0  # messages
        self._listening_since = self._sending_since = (
            math.inf
        )  # since when it waits for a message, or for one to be taken

    async def run(self) -> None:
        stream: Stream | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch)
                stream = self._open(await self._first())
                await self._send(self._ready(stream))
                tasks.start_soon(self._write, stream)
                await self._read(stream)
        except BaseException as error:
            await self._end(_only(error))
        finally:
            if stream is not None:
                stream.close()

    async def _watch(self) -> None:
        """End the connection where the client is too slow: a timer for each message would be a sixth of its cost."""
        limits = self.limits
        while True:
            await anyio.sleep(min(limits.idle_s, limits.send_s) / 4)
            now = time.monotonic()
            if now - self._listening_since > limits.idle_s:
                raise _Stop("idle", f"no message for {limits.idle_s:g} s")
            if now - self._sending_since > limits.send_s:
                raise _Stop("too_slow", f"the client has taken nothing for {limits.send_s:g} s")

    async def _end(self, error: BaseException) -> None:
        """Tell the client why the connection ends, if it is there."""
        if isinstance(error, _Stop):
            with anyio.move_on_after(1.0, shield=True), suppress(_Stop, WebSocketDisconnect):  # also a slow client
                await self._send(protocol.Error(error.code, str(error)))
                await self.socket.close(CLOSE_CODES[error.code], close_reason(str(error)))
        elif isinstance(error, WebSocketDisconnect):
            pass
        else:
            raise error

    # From the client

    async def _first(self) -> Init:
        try:
            message = protocol.from_client(await self._receive())
        except InputError as error:
            raise _Stop("bad_message", str(error)) from None
        if not isinstance(message, Init):
            raise _Stop("bad_message", f"the first message must be Init, got {type(message).__name__}")
        if message.version != protocol.VERSION:
            raise _Stop("bad_message", f"this server speaks version {protocol.VERSION}, got {message.version}")
        return message

    def _open(self, init: Init) -> Stream:
        codec = self.pool.codec
        try:
            self._rate = rate = checked_rate(init.sample_rate, init.format, codec)
            self._incoming, self._outgoing = Incoming(init.format, rate, codec), Outgoing(init.format, rate, codec)
            stream = self.pool.open(tuple(dict.fromkeys(init.directions)), num_codebooks=init.num_codebooks)
        except InputError as error:
            raise _Stop("bad_message", str(error)) from None
        except PoolFull as error:
            raise _Stop("pool_full", f"{error}: try again later") from None
        loop = asyncio.get_running_loop()

        def wake(_: Stream) -> None:
            loop.call_soon_threadsafe(self._wake)

        stream.on_results = wake
        return stream

    def _ready(self, stream: Stream) -> Ready:
        codec = self.pool.codec
        return Ready(
            version=protocol.VERSION, model=self.model, sample_rate=self._rate, codec_sample_rate=codec.sample_rate,
            frame_rate=codec.frame_rate, frame_size=codec.frame_size, channels=codec.config.audio_channels,
            num_codebooks=stream.num_codebooks, total_codebooks=self.pool.slots.num_codebooks,
            codebook_size=codec.config.codebook_size, max_queued_s=self.pool.limits.stream_s,
        )  # fmt: skip

    def _wake(self) -> None:
        self._results.set()
        self._space.set()

    async def _receive(self) -> bytes:
        """The bytes of the next message."""
        self._listening_since = time.monotonic()
        event = await self.socket.receive()
        self._listening_since = math.inf
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1005))
        return event.get("bytes") or b""

    async def _read(self, stream: Stream) -> None:
        while True:
            data = await self._receive()
            await self._pace()
            try:
                await self._take(stream, protocol.from_client(data))
            except InputError as error:
                self._bad += 1
                if self._bad > self.limits.bad_messages:
                    raise _Stop("bad_message", f"more than {self.limits.bad_messages} bad messages: {error}") from None
                await self._send(protocol.Error("bad_message", str(error)))
            except (StreamClosed, StreamFailed) as error:
                raise _Stop("failed", str(error)) from None

    async def _pace(self) -> None:
        """Wait where a client sends more messages in a second than it may."""
        now = time.monotonic()
        if not 0 <= now - self._second < 1.0:
            self._second, self._messages = now, 0
        self._messages += 1
        if self._messages > self.limits.messages_per_s:
            await anyio.sleep(max(0.0, self._second + 1.0 - now))

    async def _take(self, stream: Stream, message: protocol.FromClient) -> None:
        match message:
            case protocol.Audio():
                await self._push(stream, self._incoming.samples(message.samples))
            case protocol.Codes():
                codes = protocol.codes_of_bytes(message.codes, message.num_codebooks)
                step = self.pool.frames_per_tick
                for first in range(0, codes.shape[1], step):  # not split: a message may have half a million frames
                    await self._when_there_is_space(stream.push_codes, codes[:, first : first + step])
            case protocol.Flush():
                await self._push(stream, self._incoming.rest())
                stream.flush()
                self._flushing = True
                self._results.set()
                await self._flushed.wait()
                self._flushed.clear()
            case protocol.Reset():
                if message.num_codebooks is not None:
                    stream.num_codebooks = message.num_codebooks
                self._incoming.rest()
                self._outgoing.rest()
                stream.reset()
                self._sent_frames = 0
            case Init():
                raise InputError("Init is the first message only")

    async def _push(self, stream: Stream, audio: Tensor) -> None:
        if "encode" not in stream.directions and audio.shape[-1] == 0:
            return
        longest = int(min(0.5, self.pool.limits.stream_s / 2) * self.pool.codec.sample_rate)  # fits the queue
        for some in audio.split(max(1, longest), dim=-1):
            await self._when_there_is_space(stream.push_audio, some)

    async def _when_there_is_space(self, push: Callable[[Tensor], None], x: Tensor) -> None:
        while True:
            self._space.clear()
            try:
                return push(x)
            except StreamFull:
                with anyio.move_on_after(WAIT_S):
                    await self._space.wait()

    # To the client

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._results.wait()
            self._results.clear()
            flushed = self._flushing and stream.idle  # asked before reading: then nothing comes after what is read
            try:
                while (codes := stream.read_codes()).shape[-1]:
                    first, self._sent_frames = self._sent_frames, self._sent_frames + codes.shape[-1]
                    await self._send(protocol.Codes(protocol.codes_to_bytes(codes), len(codes), first))
                audio = stream.read_audio()
                if audio.shape[-1]:
                    await self._send_audio(self._outgoing.encoded(audio))
                if flushed:
                    await self._send_audio(self._outgoing.rest())
                    self._flushing = False
                    await self._send(protocol.Flushed())
                    self._flushed.set()
            except (StreamClosed, StreamFailed) as error:
                raise _Stop("failed", str(error)) from None

    async def _send_audio(self, data: bytes) -> None:
        if data:
            await self._send(protocol.Audio(data))

    async def _send(self, message: Message) -> None:
        if self.socket.client_state != WebSocketState.CONNECTED:
            raise WebSocketDisconnect(1006)
        self._sending += 1
        if self._sending == 1:
            self._sending_since = time.monotonic()
        await self.socket.send_bytes(protocol.pack(message))
        self._sending -= 1
        self._sending_since = time.monotonic() if self._sending else math.inf


def close_reason(text: str) -> str:
    """The beginning of a sentence, as long as WebSocket allows: 123 bytes of UTF-8."""
    return text.encode()[:123].decode(errors="ignore")


def _only(error: BaseException) -> BaseException:
    """The exception in a group of one, or the first that says something."""
    inner = getattr(error, "exceptions", None)
    if not inner:
        return error
    found = [_only(one) for one in inner]
    return next((one for one in found if isinstance(one, _Stop)), found[0])
