"""What goes wrong for one client of a server reaches no other, and its slot comes back.

All the while a healthy stream runs, whose codes and audio are compared at the end (`Healthy` in conftest.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.serve import connection
from fastmimi.serve.client import Client, ServerError
from fastmimi.serve.connection import ConnectionLimits
from fastmimi.serve.protocol import Audio, Codes, Error, Flush, Init, Reset, pack, samples_to_bytes

BAD_MESSAGES = ConnectionLimits().bad_messages
TOO_MANY = 12_000  # messages, for which the server takes a minute


def audio_message(samples, seed=0):
    return Audio(samples_to_bytes(noise(1, samples, seed=seed), "f32"))


def received(client, frames):
    """Codes [K, frames] of the next messages."""
    parts, count = [], 0
    while count < frames:
        message = client.receive()
        assert isinstance(message, Codes), message
        parts.append(np.frombuffer(message.codes, "<i2").reshape(-1, message.num_codebooks).T)
        count += parts[-1].shape[1]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int64))


@pytest.fixture
def all_gone(server, eventually):
    """Waits until the healthy stream is the only one, also in what the server counts."""

    def wait():
        eventually(lambda: server.pool.stats().free == 3, "the slots of clients that are gone come back")
        eventually(lambda: sum(server.service.clients.values()) == 1, "clients that are gone are no longer counted")
        eventually(lambda: len(server.server.server_state.connections) == 1, "their connections are closed")

    return wait


@pytest.mark.parametrize("leave", ["abort", "close"])
@pytest.mark.parametrize("when", ["at once", "after Init", "in a message", "with results unread", "in a flush"])
def test_a_client_that_vanishes(healthy, raw, all_gone, leave, when):
    for _ in range(5):
        client = raw()
        if when != "at once":
            client.send(Init())
        if when not in ("at once", "after Init"):
            client.receive()
            client.send(audio_message(5000))
        if when == "in a message":
            client.send_part(audio_message(50_000))
        if when == "in a flush":
            client.send(Flush())
        getattr(client, leave)()
        healthy.advance()
    all_gone()


@pytest.mark.slow
def test_a_client_that_never_reads(healthy, raw, all_gone):
    """It gets what the sockets hold, then `send_s` and `stalled_s`."""
    client = raw(receive_buffer=4096)
    client.open(directions=("decode",))
    frames = Codes(np.zeros((8, 6), "<i2").tobytes(), 6)
    with suppress(OSError):
        while True:
            client.send(frames)
    healthy.advance()
    all_gone()


@pytest.mark.slow
@pytest.mark.parametrize("message", [audio_message(2400), audio_message(1), Reset()])
def test_a_flood(healthy, raw, all_gone, monkeypatch, message):
    """As many messages as fit, or a minute's; then the client is gone, and they are not worked off first."""
    monkeypatch.setattr("fastmimi.serve.server.PING_S", 0.5)
    client = raw()
    client.open()

    def flood():
        with suppress(OSError):
            for _ in range(TOO_MANY):
                client.send(message)

    sending = threading.Thread(target=flood)
    sending.start()
    healthy.advance(100)  # two seconds, after which the server holds as many messages as it reads at once
    client.close()
    sending.join()
    healthy.advance()
    all_gone()


def test_twice_as_many_clients_as_slots(healthy, server, raw, all_gone):
    inside = [raw() for _ in range(3)]
    for client in inside:
        client.open()
    for _ in range(5):
        surplus = raw()
        surplus.send(Init())
        answer = surplus.receive()
        assert isinstance(answer, Error) and answer.code == "pool_full"
        assert surplus.receive() is None and surplus.close_code == 1013
    healthy.advance()
    for client in inside:
        client.close()
    all_gone()
    again = [raw() for _ in range(3)]
    for client in again:
        client.open()
    with pytest.raises(ServerError, match="all 4 slots are in use: try again later"), Client(server.url).stream():
        pass


def malformed(random):
    """Endless bytes that are no messages, or not in their place."""
    whole = [pack(m) for m in (audio_message(100), Codes(bytes(24), 6), Init(), Reset(4), Flush())]
    wrong = [
        None, 7, "Audio", [], {}, {"type": "Nothing"}, {"type": "é" * 200}, {"type": "Audio"}, {"type": 3},
        {"type": "Audio", "samples": "text"}, {"type": "Audio", "samples": [0.5]}, {"type": "Audio", "samples": b"123"},
        {"type": "Codes", "codes": bytes(12), "num_codebooks": -1}, {"type": "Reset", "num_codebooks": 1 << 40},
        {"type": "Codes", "codes": bytes(12), "num_codebooks": 1 << 63}, {"type": "Flush", "now": True},
        {"type": "Codes", "codes": bytes(11), "num_codebooks": 6}, {"type": "Reset", "num_codebooks": 0.5},
        {"type": "Codes", "codes": bytes(14), "num_codebooks": 7}, {"type": "Ready"}, {"type": "Init", "version": 2},
    ]  # fmt: skip
    wrong = [msgspec.msgpack.encode(value) for value in wrong]
    while True:
        data = whole[random.integers(len(whole))]
        yield wrong[random.integers(len(wrong))]
        yield data[: random.integers(len(data))]
        yield b"\x91" * int(random.integers(1, 5000))  # lists in lists
        yield b"\xff" + random.bytes(int(random.integers(300)))


@pytest.mark.slow
def test_ten_thousand_malformed_messages(healthy, raw, all_gone):
    messages, sent = malformed(np.random.default_rng(0)), 0
    while sent < 10_000:
        client = raw()
        client.open()
        for i in range(BAD_MESSAGES + 1):
            client.send(next(messages))
            answer = client.receive()
            assert isinstance(answer, Error) and answer.code == "bad_message", answer
            assert ("more than" in answer.message) == (i == BAD_MESSAGES)
        assert client.receive() is None and client.close_code == 1008
        sent += BAD_MESSAGES + 1
        with raw() as other:  # no Init at all
            other.send(next(messages))
            assert isinstance(other.receive(), Error) and other.receive() is None and other.close_code == 1008
    healthy.advance()
    all_gone()


@pytest.mark.parametrize("wrong, sentence", [
    (Audio(np.array([0, np.nan], "<f4").tobytes()), "finite"),
    (Audio(np.array([np.inf], "<f4").tobytes()), "finite"),
    (Audio(bytes(7)), "samples must be 1 x 4 bytes each, got 7 bytes"),
    (Codes(np.array([0, 64], "<i2").tobytes(), 2), r"codes must lie in [0, 64), got 64"),
    (Codes(np.array([0, -1], "<i2").tobytes(), 2), r"codes must lie in [0, 64), got -1"),
    (Codes(bytes(14), 7), "the number of codebooks must be from 1 to 6, got 7"),
    (Codes(bytes(5), 1), "codes must be 2 x num_codebooks bytes a frame, got 5 bytes for 1"),
    (Reset(7), "the number of codebooks must be from 1 to 6, got 7"),
    (Init(), "Init is the first message only"),
])  # fmt: skip
def test_wrong_values_are_answered_and_the_stream_goes_on(healthy, raw, codec, wrong, sentence):
    client, size = raw(), codec.frame_size
    client.open()
    client.send(audio_message(size // 2, seed=1))
    client.send(wrong)
    answer = client.receive()
    assert isinstance(answer, Error) and answer.code == "bad_message" and sentence in answer.message
    client.send(audio_message(3 * size - size // 2, seed=2))
    whole = torch.cat([noise(1, size // 2, seed=1), noise(1, 3 * size - size // 2, seed=2)], dim=1)
    assert torch.equal(received(client, 3), codec.encode(whole[None])[0])


def test_a_step_that_fails(healthy, server, raw, codec, all_gone, monkeypatch):
    """Steps that hold the victim alone fail; of the others it gets its results."""
    client, before = raw(), set(server.pool._streams)
    client.open(directions=("encode",))
    (slot,) = set(server.pool._streams) - before
    step = server.pool.slots.step_encode

    def failing(x, slots, **options):
        if list(slots) == [slot]:
            raise RuntimeError("out of memory")
        return step(x, slots, **options)

    monkeypatch.setattr(server.pool.slots, "step_encode", failing)
    answer = None
    with suppress(OSError):
        while not isinstance(answer, Error):
            client.send(audio_message(4 * codec.frame_size))
            answer = client.receive()
    assert isinstance(answer, Error) and answer.code == "failed" and "out of memory" in answer.message
    monkeypatch.undo()
    assert server.pool.stats().failed_streams == 1
    healthy.advance()
    all_gone()
    others = [raw() for _ in range(3)]  # one of them has the slot of the stream that failed
    for client in others:
        client.open()
        client.send(audio_message(2 * codec.frame_size))
    expected = codec.encode(noise(1, 1, 2 * codec.frame_size))[0]
    assert all(torch.equal(received(client, 2), expected) for client in others)


@pytest.mark.slow
@pytest.mark.parametrize("server", [{"idle_s": 1e6, "send_s": 1e6}], indirect=True)  # a jump exceeds shorter ones
def test_a_clock_that_jumps(healthy, server, raw, monkeypatch):
    """More messages than in a second may come, so that a second that never ended would hold them back."""
    client, jump, most = raw(), 0.0, server.service.settings.connection.messages_per_s
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump)
    monkeypatch.setattr(connection, "time", clock)
    client.open()
    for jump in (0.0, 3600.0, -3600.0, 0.0):  # noqa: B007 (read by the clock)
        for _ in range(most + 50):
            client.send(Audio(b""))
        client.send(Init())
        assert isinstance(client.receive(), Error)
        healthy.advance()


SERVER = """
import sys
from fastmimi.devtools.testing import small_model
from fastmimi.serve import server
from fastmimi.serve.app import Settings
from fastmimi.serve.pool import StreamPool
listener = server.listen("127.0.0.1", int(sys.argv[1]))
server.run(StreamPool(small_model(), 2, warm_up=False), Settings(model="small"), listener)
"""


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(codec):
    """Clients see that the connection has ended, and one that tries again is served from the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    audio, codes = noise(1, 1, 3 * codec.frame_size), []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stderr=subprocess.DEVNULL)
        try:
            with connected(process, port) as stream:
                stream.send_audio(audio[0])
                parts = []
                while sum(part.shape[-1] for part in parts) < 3:
                    parts.append(stream.read(timeout=20).codes)
                codes.append(torch.cat(parts, dim=-1))
                os.kill(process.pid, signal.SIGKILL)
                with pytest.raises(ServerError, match="the server has closed the connection"):
                    stream.read(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert all(torch.equal(found, codec.encode(audio)[0]) for found in codes)


@contextmanager
def connected(process, port):
    """A stream of a server that may still be starting."""
    end, client = time.perf_counter() + 60, Client(f"http://127.0.0.1:{port}")
    while True:
        with suppress(OSError):
            client.health()
            break
        assert time.perf_counter() < end and process.poll() is None, "the server starts"
        time.sleep(0.1)
    with client.stream() as stream:
        yield stream
