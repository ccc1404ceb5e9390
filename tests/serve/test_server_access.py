"""Who may connect to the server, where it may listen, and how it stops."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from websockets.exceptions import InvalidStatus

from fastmimi import InputError
from fastmimi.serve import protocol
from fastmimi.serve import server as serving
from fastmimi.serve.app import Settings
from fastmimi.serve.client import Client, ServerError
from fastmimi.serve.pool import StreamPool

SETTINGS = Settings(model="small")


def running(pool, settings=SETTINGS):
    return serving.in_thread(pool, settings)


def test_a_token(model, raw, get, until, caplog):
    with running(StreamPool(model, 1, warm_up=False), replace(SETTINGS, token="a" * 16)) as server:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        for token in (None, "b" * 16, ""):
            with (
                pytest.raises(ServerError, match="a token is needed") as caught,
                Client(server.address, token).stream(),
            ):
                pass
            assert caught.value.code == 401
        assert get(server, "/v1/encode", b"x")[0] == get(server, "/metrics")[0] == 401
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
        assert not caplog.records
        with Client(server.address, "a" * 16).stream() as stream:
            assert stream.ready.model == "small"
        until(lambda: server.service.pool.stats().free == 1)
        with raw(server, "/v1/stream?token=" + "a" * 16) as socket:
            socket.send(protocol.pack(protocol.Init()))
            assert isinstance(protocol.from_server(socket.recv()), protocol.Ready)


@pytest.mark.parametrize("headers, sentence", [
    ({"Origin": "http://evil.example"}, "pages of 'http://evil.example' may not use this server"),
    ({"Origin": "null"}, "pages of 'null'"),
    ({"Host": "[x"}, "this server is 127.0.0.1 or localhost or ::1, not ''"), ({"Origin": "http://[x"}, "pages of"),
    ({"Host": "evil.example"}, "this server is 127.0.0.1 or localhost or ::1, not 'evil.example'"),
])  # fmt: skip
def test_pages_of_others_are_refused(server, headers, sentence, raw, get):
    status, _, body = get(server, "/v1/encode", b"x", **headers)
    assert status == 403 and sentence in json.loads(body)["error"]
    if "Host" not in headers:
        with pytest.raises(InvalidStatus):
            raw(server, **headers)


def test_pages_of_its_own_and_of_allowed_origins(model, raw, until):
    allowed = replace(SETTINGS, origins=("https://page.example",))
    with running(StreamPool(model, 1, warm_up=False), allowed) as server:
        for origin in (server.address, "https://page.example"):
            with raw(server, Origin=origin) as socket:
                socket.send(protocol.pack(protocol.Init()))
                assert isinstance(protocol.from_server(socket.recv()), protocol.Ready)
            until(lambda: server.service.pool.stats().free == 1)


def test_streams_of_one_client_are_limited(model, get, until):
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
def test_sigterm_lets_streams_end_and_starts_no_new_ones(until):
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
