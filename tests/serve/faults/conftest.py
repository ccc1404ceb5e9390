"""Small models, a running server, and a healthy stream that others must not disturb."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.serve.app import Service, Settings
from fastmimi.serve.client import Client
from fastmimi.serve.connection import ConnectionLimits
from fastmimi.serve.pool import StreamPool
from fastmimi.serve.protocol import Init, Message, Ready, from_server, pack
from fastmimi.serve.server import Server, listen

PATIENCE_S = 20.0  # for what takes milliseconds, on a busy machine
SPEED = 4  # of the healthy stream, times real time


@pytest.fixture(scope="package")
def codec():
    """Its frames are 80 ms, as Mimi's."""
    return small_model()


def wait_until(condition, what):
    """Wait for a condition; fails with the sentence `what` where it does not come."""
    end = time.perf_counter() + PATIENCE_S
    while not condition():
        assert time.perf_counter() < end, f"{what} within {PATIENCE_S:g} s"
        time.sleep(0.005)


@pytest.fixture
def eventually():
    return wait_until


@dataclass
class Running:
    """A server in a thread."""

    url: str
    service: Service
    server: Server

    @property
    def pool(self):
        return self.service.pool

    @property
    def port(self):
        return self.server.listener.getsockname()[1]


@contextmanager
def running(pool, settings):
    """Serve on a free port; afterwards fails where the application raised an exception that nobody handled."""
    with listen("127.0.0.1", 0) as listener, pool:
        service = Service(pool, settings)
        server = Server(service, listener)
        errors: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: errors.append(logging.Formatter().format(record))
        logging.getLogger("uvicorn.error").addHandler(handler)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started, "the server starts")
            yield Running(server.address, service, server)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            logging.getLogger("uvicorn.error").removeHandler(handler)
        assert not thread.is_alive()
        assert not errors, "\n".join(errors)


@pytest.fixture
def serve():
    return running


@pytest.fixture
def server(codec, request):
    """A server of 4 streams, which is impatient with slow clients, and takes its time with those that send much.

    Its parameter, if there is one, changes limits of its connections.
    """
    limits = ConnectionLimits(
        **{"messages_per_s": 200, "send_s": 0.5, "stalled_s": 1.0} | getattr(request, "param", {})
    )
    with running(StreamPool(codec, 4, warm_up=False), Settings(model="small", connection=limits)) as found:
        yield found


class Healthy:
    """A duplex stream in a thread of its own, faster than real time, that sends back the codes it receives.

    At the end its codes are bit-identical to those of `encode`, and its audio is that of `decode`.
    """

    def __init__(self, url, codec):
        self.url, self.codec = url, codec
        self.frames = 0  # that came back decoded
        self._stop, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._guarded, daemon=True)

    def __enter__(self):
        self._thread.start()
        self.advance()
        return self

    def advance(self, frames=3):
        """Wait until so many frames more have come back."""
        goal = self.frames + frames
        wait_until(lambda: self.frames >= goal or self._error is not None, "the healthy stream advances")
        if self._error is not None:
            raise AssertionError("the healthy stream failed") from self._error

    def __exit__(self, kind, error, trace):
        self._stop.set()
        self._thread.join(2 * PATIENCE_S)
        if error is None:
            if self._error is not None:
                raise AssertionError("the healthy stream failed") from self._error
            self._check()

    def _guarded(self):
        try:
            with Client(self.url).stream() as stream:
                self._run(stream)
        except BaseException as error:
            self._error = error

    def _run(self, stream):
        random, size = np.random.default_rng(0), self.codec.frame_size
        self.sent, self.codes, self.audio = [], [], []

        def read(timeout):
            found = stream.read(timeout)
            if found.codes.shape[-1]:
                self.codes.append(found.codes)
                stream.send_codes(found.codes)
            if found.audio.shape[-1]:
                self.audio.append(found.audio)
                self.frames += found.audio.shape[-1] // size

        while not self._stop.is_set():
            samples = int(random.integers(1, 3 * size))
            self.sent.append(noise(samples, seed=len(self.sent)))
            stream.send_audio(self.sent[-1])
            next_at = time.perf_counter() + samples / self.codec.sample_rate / SPEED
            while (left := next_at - time.perf_counter()) > 0:
                read(left)
        whole = sum(map(len, self.sent)) // size
        end = time.perf_counter() + PATIENCE_S
        while self.frames < whole and time.perf_counter() < end:
            read(1.0)
        assert self.frames == whole, f"{self.frames} of {whole} frames came back"

    def _check(self):
        size = self.codec.frame_size
        sent, codes = torch.cat(self.sent), torch.cat(self.codes, dim=-1)
        assert torch.equal(codes, self.codec.encode(sent[None, None, : len(sent) // size * size])[0])
        assert relative_error(torch.cat(self.audio, dim=-1), self.codec.decode(codes[None])[0]) < 1e-6


class Raw:
    """A WebSocket client on a plain socket, which can break off anywhere and need not read."""

    def __init__(self, port, *, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", port))
        self.protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/v1/stream"), max_size=None)
        self._events = []
        self.protocol.send_request(self.protocol.connect())
        self._flush()
        assert self._event().status_code == 101

    def send(self, message):
        """A Message, or bytes that need not be one."""
        self.protocol.send_binary(pack(message) if isinstance(message, Message) else message)
        self._flush()

    def send_part(self, message):
        """The first half of a message's bytes, and no more."""
        self.protocol.send_binary(pack(message))
        data = b"".join(self.protocol.data_to_send())
        self.socket.sendall(data[: len(data) // 2])

    def _flush(self):
        self.socket.sendall(b"".join(self.protocol.data_to_send()))

    def _event(self):
        """The next event: a response, a frame, or None at the end of the connection."""
        while not self._events:
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self.protocol.receive_data(data)
            with suppress(OSError):  # answers to pings and to the end
                self._flush()
            self._events += self.protocol.events_received()
        return self._events.pop(0)

    def receive(self):
        """The next message; None where the server has closed the connection, after which `close_code` is there."""
        frame = self._event()
        while frame is not None and frame.opcode is Opcode.PING:
            frame = self._event()
        return from_server(bytes(frame.data)) if frame is not None and frame.opcode is Opcode.BINARY else None

    @property
    def close_code(self):
        return self.protocol.close_rcvd.code

    def open(self, **options):
        self.send(Init(**options))
        ready = self.receive()
        assert isinstance(ready, Ready), ready
        return ready

    def abort(self):
        """A TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self):
        """The end of TCP, without a word of WebSocket."""
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


@pytest.fixture
def raw(server):
    """Makes clients on plain sockets."""
    clients = []

    def make(**options):
        clients.append(Raw(server.port, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def healthy(server, codec):
    with Healthy(server.url, codec) as stream:
        yield stream
