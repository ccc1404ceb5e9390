"""How connections end and begin anew, where the moment matters: a scripted socket, and a pool stepped by hand."""

from __future__ import annotations

import asyncio
import socket
import threading
from unittest.mock import Mock

import msgspec
import pytest
import torch
from starlette.websockets import WebSocketDisconnect, WebSocketState
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from fastmimi.devtools.testing import noise
from fastmimi.serve.app import Service, Settings
from fastmimi.serve.client import Client
from fastmimi.serve.connection import CLOSE_CODES, Connection, ConnectionLimits
from fastmimi.serve.pool import StreamPool
from fastmimi.serve.protocol import (
    Audio,
    Codes,
    Error,
    Flush,
    Flushed,
    Init,
    Ready,
    from_server,
    pack,
    samples_to_bytes,
)  # fmt: skip
from fastmimi.serve.server import Server, listen


class Socket:
    """A WebSocket whose client sends what `give` is told; what is sent to it waits while `open` is cleared."""

    client_state = WebSocketState.CONNECTED

    def __init__(self):
        self.events, self.sent, self.closed = asyncio.Queue(), [], None
        self.open, self.gone = asyncio.Event(), False
        self.open.set()

    def give(self, *messages):
        for message in messages:
            self.events.put_nowait({"type": "websocket.receive", "bytes": pack(message)})

    def leave(self):
        self.events.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def receive(self):
        return await self.events.get()

    async def send_bytes(self, data):
        if self.gone:
            raise WebSocketDisconnect(1006)
        await self.open.wait()
        self.sent.append(from_server(data))

    async def close(self, code, reason):
        self.closed = code, reason


@pytest.fixture
def pool(model):
    return StreamPool(model, 2, warm_up=False)


def audio(samples, seed=0):
    return Audio(samples_to_bytes(noise(1, samples, seed=seed), "f32"))


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


def test_a_client_that_is_gone_before_ready_leaves_no_slot_in_use(pool):
    async def run():
        client = Socket()
        client.gone = True
        client.give(Init())
        await Connection(client, pool, "small", ConnectionLimits()).run()

    asyncio.run(run())
    assert pool.stats().free == 2


def test_a_client_that_reads_nothing_gets_no_error_and_no_traceback(pool):
    """Also where it takes less time to give up on it than there is for the Error."""

    async def run():
        client = Socket()
        client.open.clear()
        client.give(Init())
        await Connection(client, pool, "small", ConnectionLimits(send_s=0.01)).run()
        return client

    assert asyncio.run(run()).sent == [] and pool.stats().free == 2


def test_a_flush_waits_for_what_came_while_an_earlier_result_was_being_sent(pool):
    """The stream was idle when that result was read, and is no longer when it has been sent."""

    async def run():
        client = Socket()
        connection = asyncio.create_task(Connection(client, pool, "small", ConnectionLimits()).run())
        client.give(Init())
        await until(lambda: client.sent)
        client.open.clear()
        client.give(audio(48))
        await until(pool.step)
        await asyncio.sleep(0.01)  # the connection waits for the client to take the codes
        client.give(audio(48, seed=1), Flush())
        await until(client.events.empty)
        await asyncio.sleep(0.01)
        client.open.set()
        await asyncio.sleep(0.01)
        pool.step()
        await until(lambda: any(isinstance(message, Flushed) for message in client.sent))
        client.leave()
        await connection
        return client.sent

    ready, *results, flushed = asyncio.run(run())
    assert isinstance(ready, Ready) and isinstance(flushed, Flushed)
    assert [(type(message), message.first_frame) for message in results] == [(Codes, 0), (Codes, 1)]


def test_idle_is_not_asked_in_the_middle_of_a_tick(pool):
    """A tick takes the input first and says so afterwards, or the other way round; a stream is idle in neither case."""
    stream, asked = pool.open(), threading.Event()

    def ask():
        stream.idle  # noqa: B018
        asked.set()

    thread = threading.Thread(target=ask)
    with pool._lock:
        thread.start()
        assert not asked.wait(0.1)
    thread.join()
    assert asked.is_set()


def test_a_reset_drops_what_resampling_still_holds(serve, model):
    codes = torch.zeros(6, 40, dtype=torch.int64)

    def heard(stream):
        stream.flush()
        parts = []
        while not parts or not parts[-1].flushed:
            parts.append(stream.read(timeout=20))
        return torch.cat([part.audio for part in parts], dim=-1)

    with serve(StreamPool(model, 1, warm_up=False), Settings()) as server:
        with Client(server.url).stream(("decode",), sample_rate=16_000) as stream:
            stream.send_codes(codes)
            first = heard(stream)
        with Client(server.url).stream(("decode",), sample_rate=16_000) as stream:
            stream.send_codes(codes)
            assert stream.read(timeout=20).audio.shape[-1]
            while stream.read(timeout=0.2).audio.shape[-1]:
                pass
            stream.reset()
            stream.send_codes(codes)
            again = heard(stream)
    assert torch.equal(first, again)


def test_the_reason_of_a_close_fits_whatever_the_client_sent(serve, model):
    """WebSocket allows 123 bytes, and a message of ours may quote what is longer in UTF-8 than in characters."""
    with serve(StreamPool(model, 1, warm_up=False), Settings()) as server, \
            connect(server.url.replace("http", "ws") + "/v1/stream") as client:  # fmt: skip
        client.send(msgspec.msgpack.encode({"type": "é" * 200}))
        assert isinstance(from_server(client.recv()), Error)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
        assert closed.value.rcvd.code == CLOSE_CODES["bad_message"]


def test_a_stream_too_many_that_is_gone_already_is_no_error(pool):
    class Gone(Socket):
        client, headers, query_params = None, {"host": "localhost"}, {}

        async def accept(self):
            self.gone = True

    async def run():
        service = Service(pool, Settings())
        service.draining = True
        await service.stream(Gone())

    asyncio.run(run())


def test_connections_send_small_messages_at_once_and_end_where_nobody_takes_them(pool):
    """Both are inherited from the listener; a pong that stands behind much input does not end a connection."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(Service(pool, Settings(connection=ConnectionLimits(stalled_s=7))), listener)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
        assert server.config.ws_ping_timeout is None


def test_messages_of_a_client_that_is_gone_are_not_worked_off_first(pool):
    with listen("127.0.0.1", 0) as listener:
        config = Server(Service(pool, Settings()), listener).config

        async def events():
            config.load()
            protocol = config.ws_protocol_class(config, ServerState(), {})
            protocol.connection_made(Mock())
            for kind in ("connect", "receive", "receive"):
                protocol.queue.put_nowait({"type": f"websocket.{kind}"})
            protocol.connection_lost(None)
            return [protocol.queue.get_nowait()["type"] for _ in range(protocol.queue.qsize())]

        assert asyncio.run(events()) == ["websocket.connect", "websocket.disconnect"]
