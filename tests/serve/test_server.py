"""The server over real sockets: streams, files, who may connect, limits, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.numpy import load as load_tensors
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from fastmimi import InputError
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.io.tokens import Tokens
from fastmimi.serve import protocol
from fastmimi.serve import server as serving
from fastmimi.serve.app import Service, Settings
from fastmimi.serve.client import AsyncClient, Client, ServerError
from fastmimi.serve.connection import ConnectionLimits
from fastmimi.serve.pool import StreamPool
from fastmimi.serve.server import Server

SETTINGS = Settings(model="small")


@contextmanager
def running(pool, settings=SETTINGS, **options):
    """A server in a thread; yields it once it listens."""
    with serving.listen("127.0.0.1", 0) as listener:
        server = Server(Service(pool, settings), listener, **options)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield server
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model):
    with running(StreamPool(model, 4, warm_up=False)) as server:
        yield server


@pytest.fixture
def client(server):
    yield Client(server.address)
    until(lambda: server.service.pool.stats().free == 4)


def until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def raw(server, path="/v1/stream", **headers):
    return connect(f"ws{server.address[4:]}{path}", additional_headers=headers, compression=None)


def get(server, path, data=None, method=None, **headers):
    """Status, headers and body of an answer."""
    request = urllib.request.Request(server.address + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


# Streams


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


def test_opus(model, server):
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


def test_a_full_pool_is_said_and_recovers(client):
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
def test_a_first_message_that_asks_for_the_impossible(server, first, sentence):
    with raw(server) as socket:
        socket.send(protocol.pack(first))
        answer = protocol.from_server(socket.recv())
        assert (answer.code, sentence in answer.message) == ("bad_message", True), answer
    assert server.service.pool.stats().free == 4


def test_a_bad_message_leaves_the_stream_as_it_is(model, server):
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


def test_limits_of_a_connection(model):
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


# Files


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "speech.wav"
    soundfile.write(path, noise(12_345, scale=0.1).numpy(), 24_000, subtype="FLOAT")
    return path


def test_files_there_and_back(model, client, recording, tmp_path):
    tokens = client.encode(recording, num_codebooks=3)
    expected = model.encode(noise(12_345, scale=0.1)[None, None], num_codebooks=3)[0]
    assert (load_tensors(tokens)["codes"] == expected.numpy()).all()
    (tmp_path / "tokens").write_bytes(tokens)
    assert Tokens.load(tmp_path / "tokens").length == 12_345
    (tmp_path / "back.wav").write_bytes(client.decode(tokens))
    back, rate = soundfile.read(tmp_path / "back.wav", dtype="float32")
    sound = model.decode(expected[None])[0, 0, :12_345]
    assert (rate, back.shape) == (24_000, (12_345,))
    assert np.abs(back - sound.numpy().clip(-1, 1)).max() < 2**-15


def test_codes_as_json(model, server, recording):
    status, _, body = get(server, "/v1/encode?format=json&num_codebooks=2", recording.read_bytes())
    found = json.loads(body)
    expected = model.encode(noise(12_345, scale=0.1)[None, None], num_codebooks=2)[0]
    assert (status, found["length"], found["frame_rate"]) == (200, 12_345, model.frame_rate)
    assert found["codes"] == expected.tolist()


@pytest.mark.parametrize("path, body, status, sentence", [
    ("/v1/encode", b"", 400, "the file is empty"), ("/v1/encode", b"x" * 99, 400, "is not an audio file"),
    ("/v1/decode", b"x" * 99, 400, "the file is not a safetensors file"),
    ("/v1/encode?num_codebooks=99", None, 400, "the number of codebooks must be from 1 to 6, got 99"),
    ("/v1/encode?num_codebooks=-1", None, 400, "num_codebooks must be a number, got '-1'"),
])  # fmt: skip
def test_files_that_are_refused(server, recording, path, body, status, sentence):
    answer = get(server, path, recording.read_bytes() if body is None else body)
    assert answer[0] == status and sentence in json.loads(answer[2])["error"], answer


def test_codes_of_other_weights_are_refused(client, recording):
    from fastmimi.devtools.testing import small_model

    other = small_model(seed=1, upsampling_ratios=[4, 3, 2])
    with running(StreamPool(other, 1, warm_up=False)) as elsewhere:
        tokens = Client(elsewhere.address).encode(recording)
    with pytest.raises(ServerError, match=r"these codes were made with small .*, and the server has other weights"):
        client.decode(tokens)


def test_uploads_have_a_limit(model, recording):
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, upload_bytes=1000)) as server:
        status, _, body = get(server, "/v1/encode", recording.read_bytes())
        assert (status, json.loads(body)["error"]) == (413, "a file may have 1000 bytes at most")
        assert server.service.pool.stats().free == 1


# Who may connect


def test_a_token(model):
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, token="a" * 16)) as server:
        for token in (None, "b" * 16, ""):
            with (
                pytest.raises(ServerError, match="a token is needed") as caught,
                Client(server.address, token).stream(),
            ):
                pass
            assert caught.value.code == 401
        assert get(server, "/v1/encode", b"x")[0] == get(server, "/metrics")[0] == 401
        with Client(server.address, "a" * 16).stream() as stream:
            assert stream.ready.model == "small"
        until(lambda: server.service.pool.stats().free == 1)
        with raw(server, "/v1/stream?token=" + "a" * 16) as socket:
            socket.send(protocol.pack(protocol.Init()))
            assert isinstance(protocol.from_server(socket.recv()), protocol.Ready)


@pytest.mark.parametrize("headers, sentence", [
    ({"Origin": "http://evil.example"}, "pages of 'http://evil.example' may not use this server"),
    ({"Origin": "null"}, "pages of 'null'"),
    ({"Host": "evil.example"}, "this server is 127.0.0.1 or localhost or ::1, not 'evil.example'"),
])  # fmt: skip
def test_pages_of_others_are_refused(server, headers, sentence):
    status, _, body = get(server, "/v1/encode", b"x", **headers)
    assert status == 403 and sentence in json.loads(body)["error"]
    if "Host" not in headers:
        with pytest.raises(InvalidStatus):
            raw(server, **headers)


def test_pages_of_its_own_and_of_allowed_origins(model):
    allowed = replace(SETTINGS, origins=("https://page.example",))
    with running(StreamPool(model, 1, warm_up=False), allowed) as server:
        for origin in (server.address, "https://page.example"):
            with raw(server, Origin=origin) as socket:
                socket.send(protocol.pack(protocol.Init()))
                assert isinstance(protocol.from_server(socket.recv()), protocol.Ready)
            until(lambda: server.service.pool.stats().free == 1)


def test_streams_of_one_client_are_limited(model):
    with running(StreamPool(model, 3, warm_up=False), replace(SETTINGS, streams_per_client=1)) as server:
        client = Client(server.address)
        with client.stream():
            with pytest.raises(ServerError, match="has 1 streams, at most 1 may run") as caught, client.stream():
                pass
            assert caught.value.code == "busy"
            assert get(server, "/v1/encode", b"x")[0] == 503
        until(lambda: not server.service.clients)
        with client.stream():
            pass


# The rest


def test_the_page(server):
    status, headers, body = get(server, "/")
    assert status == 200 and b"<title>" in body and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert get(server, "/../app.py")[0] == get(server, "/%2e%2e/app.py")[0] == get(server, "/nothing")[0] == 404


def test_health_and_metrics(client, server, recording):
    client.encode(recording)
    health = json.loads(client.health())
    assert (health["status"], health["model"], health["capacity"]) == ("ok", "small", 4)
    assert health["encoded_frames"] > 0
    status, _, body = get(server, "/metrics")
    lines = dict(line.split() for line in body.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines["fastmimi_encoded_frames_total"]) >= health["encoded_frames"]
    assert float(lines["fastmimi_capacity"]) == 4


@pytest.mark.parametrize("host, token, sentence", [
    ("0.0.0.0", None, "a server on 0.0.0.0 can be reached by other machines: give it a --token-file"),
    ("::", None, "a server on :: can be reached"), ("example.org", None, "a server on example.org can be reached"),
    ("0.0.0.0", "short", "must be at least 16 printable ASCII characters"),
    ("127.0.0.1", "é" * 20, "must be at least 16 printable ASCII characters"),
])  # fmt: skip
def test_addresses_of_others_need_a_token(tmp_path, host, token, sentence):
    path = tmp_path / "token"
    if token is not None:
        path.write_text(token, encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        serving.checked(SETTINGS, host, None if token is None else path)


def test_a_missing_token_file_and_a_taken_port(tmp_path, server):
    with pytest.raises(InputError, match=r"cannot read .*none"):
        serving.checked(SETTINGS, "127.0.0.1", tmp_path / "none")
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
        serving.listen("127.0.0.1", port)
    good = tmp_path / "token"
    good.write_text("0123456789abcdef\n")
    assert serving.checked(SETTINGS, "0.0.0.0", good).token == "0123456789abcdef"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_lets_streams_end_and_starts_no_new_ones():
    command = [sys.executable, "-m", "fastmimi", "serve", "--model", "demo", "--port", "0", "--streams", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        address = next(line.split()[-1] for line in process.stderr if " serves " in line)
        client = Client(address)
        with client.stream(("encode",)) as stream:
            stream.send_audio(torch.zeros(1920))
            process.send_signal(signal.SIGTERM)
            until(lambda: json.loads(client.health())["status"] == "draining")
            with pytest.raises(ServerError, match="the server is about to stop") as caught, client.stream():
                pass
            assert caught.value.code == "draining"
            stream.send_audio(torch.zeros(1920))
            stream.flush()
            assert stream.read_until_flushed().codes.shape[-1] == 2
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
