"""Streams of the server over real sockets: they equal the whole, and bad messages change nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soxr
import torch

from fastmimi.devtools.testing import noise, relative_error
from fastmimi.serve import protocol
from fastmimi.serve import server as serving
from fastmimi.serve.app import Settings
from fastmimi.serve.client import AsyncClient, Client, ServerError
from fastmimi.serve.connection import ConnectionLimits
from fastmimi.serve.pool import StreamPool

SETTINGS = Settings(model="small")


def running(pool, settings=SETTINGS):
    return serving.in_thread(pool, settings)


def test_a_duplex_stream_equals_the_whole(model, client):
    audio, heard, coded = noise(48 * 20 + 5), [], []
    with client.stream(num_codebooks=4) as stream:
        assert (stream.ready.model, stream.ready.num_codebooks, stream.ready.frame_size) == ("small", 4, 48)
        for part in audio.split(130):
            stream.send_audio(part)
            found = stream.read(timeout=0)
            coded.append(found.codes)
            heard.append(found.audio)
        stream.flush()
        found = stream.read_until_flushed()
        coded.append(found.codes)
        codes = torch.cat(coded, dim=-1)
        for frame in codes.unbind(-1):
            stream.send_codes(frame)
        stream.flush()
        found = stream.read_until_flushed()
        heard.append(found.audio)
    assert torch.equal(codes, model.encode(audio[None, None], num_codebooks=4)[0])
    assert relative_error(torch.cat(heard, dim=-1), model.decode(codes[None])[0]) < 1e-5


def test_utterances_are_independent_after_a_reset(model, client):
    with client.stream(("encode",)) as stream:
        for seed in (1, 2):
            audio = noise(48 * 7 + 11, seed=seed)
            stream.send_audio(audio)
            stream.flush()
            assert torch.equal(stream.read_until_flushed().codes, model.encode(audio[None, None])[0])
            stream.reset()


def test_a_flushed_stream_goes_on(model, client):
    audio = noise(48 * 4)
    with client.stream(("encode",)) as stream:
        for part in audio.split(60):
            stream.send_audio(part)
        stream.flush()
        codes = [stream.read_until_flushed().codes]
        stream.send_audio(audio)
        stream.flush()
        codes.append(stream.read_until_flushed().codes)
    assert torch.equal(torch.cat(codes, dim=-1), model.encode(torch.cat([audio, audio])[None, None])[0])


def test_a_reset_drops_what_was_sent_and_changes_the_codebooks(model, client):
    audio = noise(48 * 6)
    with client.stream(("encode",)) as stream:
        stream.send_audio(noise(48 * 6 + 3, seed=5))
        stream.reset(num_codebooks=2)
        stream.send_audio(audio)
        stream.flush()
        parts = []
        while not parts or not parts[-1].flushed:
            parts.append(stream.read())
        codes = torch.cat([part.codes for part in parts if len(part.codes) == 2], dim=-1)
    assert torch.equal(codes[:, -6:], model.encode(audio[None, None], num_codebooks=2)[0])


@pytest.mark.parametrize("kind, rate", [("f32", 48_000), ("s16", None), ("s16", 16_000)])
def test_other_rates_and_formats(model, client, kind, rate):
    """Codes of the whole that soxr resamples at once; audio comes back at the client's rate."""
    audio = (noise(rate or 24_000, scale=0.1) * 32768).round() / 32768
    expected = audio if rate is None else torch.from_numpy(soxr.resample(audio.numpy(), rate, 24_000))
    with client.stream(sample_rate=rate, format=kind) as stream:
        for part in audio.split(999):
            stream.send_audio(part)
        stream.flush()
        codes = stream.read_until_flushed().codes
        stream.send_codes(codes)
        stream.flush()
        heard = stream.read_until_flushed().audio
    whole = model.encode(expected[None, None])[0]
    assert abs(codes.shape[-1] - whole.shape[-1]) <= 1
    if rate is None:
        assert torch.equal(codes, whole)
    assert abs(heard.shape[-1] - codes.shape[-1] * 48 * (rate or 24_000) // 24_000) <= 50


def test_opus(model, server, raw):
    sphn = pytest.importorskip("sphn")
    writer, audio = sphn.OpusStreamWriter(24_000), noise(24_000, scale=0.1).numpy()
    with raw(server) as socket:
        socket.send(protocol.pack(protocol.Init(format="opus")))
        assert isinstance(protocol.from_server(socket.recv()), protocol.Ready)
        for start in range(0, len(audio), 960):
            socket.send(protocol.pack(protocol.Audio(bytes(writer.append_pcm(audio[start : start + 960])))))
        socket.send(protocol.pack(protocol.Flush()))
        coded = []
        while not isinstance(message := protocol.from_server(socket.recv()), protocol.Flushed):
            coded.append(message)
        assert sum(len(message.codes) // 2 // message.num_codebooks for message in coded) > 400
        for message in coded:
            socket.send(protocol.pack(message))
        socket.send(protocol.pack(protocol.Flush()))
        opus = b""
        while not isinstance(message := protocol.from_server(socket.recv()), protocol.Flushed):
            opus += message.samples
        assert opus.startswith(b"OggS")


def test_a_full_pool_is_said_and_recovers(client, until):
    with client.stream(), client.stream(), client.stream(), client.stream():
        with pytest.raises(ServerError, match="all 4 slots are in use") as caught, client.stream():
            pass
        assert caught.value.code == "pool_full"
    until(lambda: json.loads(client.health())["free"] == 4)
    with client.stream():
        pass


def test_a_stream_in_asyncio(model, server):
    import asyncio

    audio = noise(48 * 9)

    async def run():
        async with AsyncClient(server.address).stream(("encode",)) as stream:
            await stream.send_audio(audio)
            await stream.flush()
            parts = []
            async for found in stream:
                parts.append(found.codes)
                if found.flushed:
                    break
            return torch.cat(parts, dim=-1)

    assert torch.equal(asyncio.run(run()), model.encode(audio[None, None])[0])


@pytest.mark.parametrize("first, sentence", [
    (protocol.Flush(), "the first message must be Init, got Flush"),
    (protocol.Init(version=2), "this server speaks version 1, got 2"),
    (protocol.Init(num_codebooks=7), "the number of codebooks must be from 1 to 6, got 7"),
    (protocol.Init(sample_rate=100), "sample_rate must be from 8000 to 192000 Hz, got 100"),
    (protocol.Init(sample_rate=48_000, format="opus"), "opus is decoded at the codec's 24000 Hz"),
    (protocol.Init(directions=()), "directions must be among encode, decode"),
])  # fmt: skip
def test_a_first_message_that_asks_for_the_impossible(server, first, sentence, raw):
    with raw(server) as socket:
        socket.send(protocol.pack(first))
        answer = protocol.from_server(socket.recv())
        assert (answer.code, sentence in answer.message) == ("bad_message", True), answer
    assert server.service.pool.stats().free == 4


def test_a_bad_message_leaves_the_stream_as_it_is(model, server, raw):
    audio = noise(48 * 4)
    bad = [
        b"nonsense", protocol.pack(protocol.Init()), protocol.pack(protocol.Audio(b"abc")),
        protocol.pack(protocol.Audio(np.array([np.nan], "<f4").tobytes())),
        protocol.pack(protocol.Codes(b"\xff\x7f", 1)), protocol.pack(protocol.Codes(b"\x00\x00", 3)),
        protocol.pack(protocol.Reset(num_codebooks=99)),
    ]  # fmt: skip
    with raw(server) as socket:
        socket.send(protocol.pack(protocol.Init(directions=("encode", "decode"))))
        socket.recv()
        socket.send(protocol.pack(protocol.Audio(protocol.samples_to_bytes(audio[None, :70], "f32"))))
        for message in bad:
            socket.send(message)
        socket.send("text is no message either")
        socket.send(protocol.pack(protocol.Audio(protocol.samples_to_bytes(audio[None, 70:], "f32"))))
        socket.send(protocol.pack(protocol.Flush()))
        errors, codes = 0, []
        while not isinstance(message := protocol.from_server(socket.recv()), protocol.Flushed):
            if isinstance(message, protocol.Error):
                assert message.code == "bad_message"
                errors += 1
            else:
                codes.append(protocol.codes_of_bytes(message.codes, message.num_codebooks))
    assert errors == len(bad) + 1
    assert torch.equal(torch.cat(codes, dim=-1), model.encode(audio[None, None])[0])


def test_limits_of_a_connection(model, raw, until):
    limits = ConnectionLimits(idle_s=0.3, bad_messages=2, message_bytes=1000)
    with running(StreamPool(model, 2, warm_up=False), replace(SETTINGS, connection=limits)) as server:
        client = Client(server.address)
        with client.stream() as stream, pytest.raises(ServerError, match=r"no message for 0\.3 s"):
            stream.read()
        with raw(server) as socket:
            socket.send(protocol.pack(protocol.Init()))
            socket.recv()
            for _ in range(3):
                socket.send(b"nonsense")
            said = [protocol.from_server(socket.recv()).message for _ in range(3)]
            assert said[2].startswith("more than 2 bad messages")
            with pytest.raises(Exception, match="1008"):
                socket.recv()
        with client.stream() as stream:
            stream.send_audio(torch.zeros(1000))
            with pytest.raises(ServerError):
                stream.read()
        until(lambda: server.service.pool.stats().free == 2)
