"""What the server answers over HTTP: files, the page, health and metrics."""

import json
import socket
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load as load_tensors

from fastmimi.devtools.testing import noise
from fastmimi.io.tokens import Tokens
from fastmimi.serve import server as serving
from fastmimi.serve.app import Settings
from fastmimi.serve.client import Client, ServerError
from fastmimi.serve.pool import StreamPool

SETTINGS = Settings(model="small")


def running(pool, settings=SETTINGS):
    return serving.in_thread(pool, settings)


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


def test_codes_as_json(model, server, recording, get):
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
def test_files_that_are_refused(server, recording, path, body, status, sentence, get):
    answer = get(server, path, recording.read_bytes() if body is None else body)
    assert answer[0] == status and sentence in json.loads(answer[2])["error"], answer


def test_codes_of_other_weights_are_refused(client, recording):
    from fastmimi.devtools.testing import small_model

    other = small_model(seed=1, upsampling_ratios=[4, 3, 2])
    with running(StreamPool(other, 1, warm_up=False)) as elsewhere:
        tokens = Client(elsewhere.address).encode(recording)
    with pytest.raises(ServerError, match=r"these codes were made with small .*, and the server has other weights"):
        client.decode(tokens)


def test_uploads_have_a_limit(model, recording, get):
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, upload_bytes=1000)) as server:
        status, _, body = get(server, "/v1/encode", recording.read_bytes())
        assert (status, json.loads(body)["error"]) == (413, "a file may have 1000 bytes at most")
        assert server.service.pool.stats().free == 1


def test_files_have_a_longest_duration(model, client, recording):
    tokens = client.encode(recording)
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, file_s=0.5)) as server:
        for call in (lambda: Client(server.address).encode(recording), lambda: Client(server.address).decode(tokens)):
            with pytest.raises(ServerError, match=r"a file may hold 0\.5 s of audio at most, got 0\.5 s"):
                call()


def test_a_file_that_does_not_arrive_in_time(model):
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, upload_s=0.2)) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /v1/encode HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\nhalf".encode())
            assert b" 408 " in slow.recv(1000)


def test_temporary_files_are_removed(client, recording, tmp_path, monkeypatch, until):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client.decode(client.encode(recording))
    with pytest.raises(ServerError):
        client.decode(b"nonsense")
    until(lambda: not list(tmp_path.iterdir()))


def test_the_page(server, get):
    status, headers, body = get(server, "/")
    assert status == 200 and b"<title>" in body and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert get(server, "/../app.py")[0] == get(server, "/%2e%2e/app.py")[0] == get(server, "/nothing")[0] == 404


def test_health_and_metrics(client, server, recording, get):
    client.encode(recording)
    health = json.loads(client.health())
    assert (health["status"], health["model"], health["capacity"]) == ("ok", "small", 4)
    assert health["encoded_frames"] > 0
    status, _, body = get(server, "/metrics")
    lines = dict(line.split() for line in body.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines["fastmimi_encoded_frames_total"]) >= health["encoded_frames"]
    assert float(lines["fastmimi_capacity"]) == 4
