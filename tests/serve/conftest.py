"""A small model whose frames are 48 samples, a server of it, and ways to talk to that."""

import time
import urllib.error
import urllib.request

import pytest
from websockets.sync.client import connect

from fastmimi.devtools.testing import small_model
from fastmimi.serve import server as serving
from fastmimi.serve.app import Settings
from fastmimi.serve.client import Client
from fastmimi.serve.pool import StreamPool


@pytest.fixture(scope="package")
def model():
    return small_model(upsampling_ratios=[4, 3, 2])


@pytest.fixture(scope="module")
def server(model):
    """A server of four streams, in a thread."""
    with serving.in_thread(StreamPool(model, 4, warm_up=False), Settings(model="small")) as server:
        yield server


@pytest.fixture
def client(server, until):
    yield Client(server.address)
    until(lambda: server.service.pool.stats().free == 4)


@pytest.fixture(scope="session")
def until():
    """Wait for something to become true."""

    def until(true, seconds=10):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.01)

    return until


@pytest.fixture(scope="session")
def raw():
    """Connect a WebSocket to a server."""

    def raw(server, path="/v1/stream", **headers):
        return connect(f"ws{server.address[4:]}{path}", additional_headers=headers, compression=None)

    return raw


@pytest.fixture(scope="session")
def get():
    """Status, headers and body of an answer."""

    def get(server, path, data=None, **headers):
        request = urllib.request.Request(server.address + path, data, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    return get
