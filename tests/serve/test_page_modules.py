"""The page's modules, each in Chromium and without a server: messages, the transform, latency."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import msgspec
import numpy as np
import pytest

from fastmimi.serve import protocol
from fastmimi.serve.app import PAGE

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium, which is not installed here"),
]
ADDRESS = "http://localhost/"
AGAIN = """async (bytes) => {
    const { decode, encode } = await import("/msgpack.js");
    const value = decode(new Uint8Array(bytes));
    const plain = (key, x) => (x instanceof Uint8Array ? { bytes: [...x] } : x);
    return { value: JSON.stringify(value, plain), bytes: [...encode(value)] };
}"""
POWER = """async (samples) => {
    const { Fft } = await import("/fft.js");
    return [...new Fft(samples.length).power(Float32Array.from(samples))];
}"""
LATENCY = """async ([frame, events]) => {
    const { Latency } = await import("/latency.js");
    const latency = new Latency(frame);
    for (const [what, samples, now] of events) latency[what](samples, now);
    return latency.median(events.at(-1)[2]);
}"""
FIFO = """async ([chunks, counts]) => {
    const { Fifo } = await import("/fifo.js");
    const fifo = new Fifo();
    for (const chunk of chunks) fifo.push(Float32Array.from(chunk));
    return counts.map((count) => [[...fifo.take(count)], fifo.length]);
}"""


@pytest.fixture(scope="module")
def page():
    """A page whose address has the modules and nothing else."""

    def serve(route):
        name = route.request.url.removeprefix(ADDRESS)
        route.fulfill(path=PAGE / name) if name else route.fulfill(body="<!doctype html>", content_type="text/html")

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.route(f"{ADDRESS}**", serve)
        page.goto(ADDRESS)
        yield page
        browser.close()


def again(page, data: bytes) -> tuple[Any, bytes]:
    """Decoded, with bytes as {"bytes": [...]}, and encoded again."""
    result = page.evaluate(AGAIN, list(data))
    return json.loads(result["value"]), bytes(result["bytes"])


@pytest.mark.parametrize(
    "message",
    [
        protocol.Init(), protocol.Init(directions=("decode",), num_codebooks=8, sample_rate=48_000, format="s16"),
        protocol.Audio(b"\x00\x80\xff" * 8), protocol.Audio(b""), protocol.Audio(bytes(70_000)),
        protocol.Codes(b"\x01\x02" * 6, num_codebooks=3, first_frame=70_000), protocol.Codes(bytes(300), 1, 1 << 40),
        protocol.Flush(), protocol.Reset(), protocol.Reset(num_codebooks=300),
        protocol.Ready(1, "mimi", 48_000, 24_000, 12.5, 1920, 1, 8, 32, 2048, 4.5),
        protocol.Flushed(), protocol.Error("pool_full", "alle Plätze sind besetzt, " * 20),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_messages_are_those_of_python(page, message):
    data = protocol.pack(message)
    fields = msgspec.msgpack.decode(data).items()
    value, encoded = again(page, data)
    assert value == {name: {"bytes": list(x)} if isinstance(x, bytes) else x for name, x in fields}
    assert encoded == data


def test_values_at_the_limits_of_their_encodings(page):
    edges = [sign * 2**k + d for sign in (1, -1) for k in (5, 7, 8, 15, 16, 31, 32, 52) for d in (-1, 0, 1)]
    texts = ["é" * 16, *("x" * n for n in (31, 32, 255, 256, 65_535, 65_536))]
    lists = [[0] * n for n in (15, 16, 65_536)]
    maps = [{str(i): i for i in range(n)} for n in (15, 16)]
    values = [*edges, 0.1, -1e300, True, False, None, *texts, *lists, *maps]
    data = msgspec.msgpack.encode(values)
    assert again(page, data) == (values, data)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"\x82\xa1a", "ends too early"), (b"\xc4\x05ab", "ends too early"), (b"\x01\x02", "1 bytes follow"),
        (b"\xcf" + b"\xff" * 8, "beyond 2^53"), (b"\xd4\x00\x00", "does not read: 0xd4"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(page, data, sentence):
    with pytest.raises(playwright.Error, match=re.escape(sentence)):
        again(page, data)


def test_the_transform_is_that_of_numpy(page):
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    expected = np.abs(np.fft.rfft(x.astype(np.float64))) ** 2
    found = np.array(page.evaluate(POWER, x.tolist()))
    assert np.abs(found - expected).max() < 1e-5 * expected.max()


def test_latency_is_from_the_last_sample_of_a_frame_to_its_audio(page):
    """Frames of 100 samples; a resampler holds 30 samples back, and one frame comes later than the others."""
    sent = [("sent", 50, 10 * i) for i in range(6)]  # frames end at 10, 30 and 50 ms
    received = [("received", 70, 17), ("received", 100, 39), ("received", 100, 250)]
    events = sorted(sent + received, key=lambda event: event[2])
    assert page.evaluate(LATENCY, [100, events]) == 9  # the median of 7, 9 and 200
    assert page.evaluate(LATENCY, [100, [*events, ("sent", 1, 6000)]]) is None  # the last five seconds had none


def test_samples_are_taken_in_the_order_in_which_they_came(page):
    taken = page.evaluate(FIFO, [[[1, 2, 3], [4], [5, 6]], [2, 3, 9, 1]])
    assert taken == [[[1, 2], 4], [[3, 4, 5], 1], [[6], 0], [[], 0]]
