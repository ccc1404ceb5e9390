"""The page at `/`, in Chromium: it sounds, shows, switches, and survives a server that restarts."""

from __future__ import annotations

import re
import shutil
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr
import torch

import fastmimi
from fastmimi.serve import protocol
from fastmimi.serve.app import SAMPLE, Service, Settings
from fastmimi.serve.client import Client
from fastmimi.serve.pool import StreamPool
from fastmimi.serve.server import Server, listen

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium, which is not installed here"),
]
CODEBOOKS = 16  # of the demo
TOKEN = "a token of many letters"
NETWORK = re.compile("ERR_CONNECTION|ERR_EMPTY_RESPONSE|WebSocket connection|status of 401")  # said by the browser
PLAYED = """(seconds) => {
    const { player } = fastmimi;
    return player !== null && player.stats.played > seconds * player.context.sampleRate;
}"""
PIXELS = """([selector, left, width]) => {
    const canvas = document.querySelector(selector);
    const copy = new OffscreenCanvas(width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, left < 0 ? -left - canvas.width : -left, 0);
    return [...new Uint32Array(copy.getImageData(0, 0, width, canvas.height).data.buffer)];
}"""
RECORD = """() => {
    const { player } = fastmimi;
    const push = player.push.bind(player);
    window.pushed = { original: [], decoded: [] };
    player.push = (original, decoded) => {
        pushed.original.push(...original);
        pushed.decoded.push(...decoded);
        push(original, decoded);
    };
}"""
LISTEN = """() => {
    const { player } = fastmimi;
    window.heard = new AnalyserNode(player.context, { fftSize: 8192 });
    player.output.connect(heard);
}"""
HEARD = """() => {
    const samples = new Float32Array(heard.fftSize);
    heard.getFloatTimeDomainData(samples);
    return [...samples];
}"""


class Host:
    """A server in a thread, which can be stopped and started again on its port."""

    def __init__(self, model: Any, settings: Settings, port: int = 0):
        self.model, self.settings, self.port = model, settings, port

    def __enter__(self) -> Host:
        self.pool = StreamPool(self.model, 4)
        self.server = Server(Service(self.pool, self.settings), listen("127.0.0.1", self.port))
        self.url = self.server.address
        self.port = int(self.url.rpartition(":")[2])
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def demo():
    return fastmimi.load("demo")


@pytest.fixture(scope="module")
def host(demo):
    with Host(demo, Settings()) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    speech = tmp_path_factory.mktemp("page") / "speech.wav"
    soundfile.write(speech, *soundfile.read(SAMPLE), subtype="PCM_16")
    flags = [
        "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={speech}", "--autoplay-policy=no-user-gesture-required",
    ]  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def console():
    """Warnings and errors of the page, of which there must be none."""
    said: list[str] = []
    yield said
    assert said == []


@pytest.fixture
def blank(browser, console):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(15_000)
    page.on("console", lambda message: console.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    yield page
    page.close()


@pytest.fixture
def page(blank, host):
    blank.goto(host.url)
    says(blank, "Ready")
    return blank


def says(page, text: str) -> None:
    playwright.expect(page.get_by_role("status")).to_contain_text(text, timeout=15_000)


def wait_played(page, seconds: float) -> None:
    page.wait_for_function(PLAYED, arg=seconds)


def played(page) -> float:
    """Seconds."""
    return page.evaluate("() => fastmimi.player.stats.played / fastmimi.player.context.sampleRate")


def pixels(page, name: str, left: int) -> np.ndarray:
    """Colours of 40 columns of a picture, [height, 40] as integers; left: of the first, negative from the right."""
    return np.array(page.evaluate(PIXELS, [f"#{name} canvas", left, 40]), np.uint32).reshape(-1, 40)


def tone(path, seconds: float, rate: int = 16_000):
    """A file of a tone that becomes louder, in two channels."""
    t = np.arange(int(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * 220 * t) * t / seconds
    soundfile.write(path, np.stack([x, x], axis=1), rate)
    return path


def test_it_says_which_model_it_is(page, host):
    assert page.inner_text("#model") == "Model demo · 24 kHz · 12.5 frames/s · 16 codebooks"
    assert "far from the quality of Kyutai" in page.inner_text("#demo-note")
    assert page.inner_text("#kbps") == "2.2"
    page.wait_for_function("() => document.getElementById('capacity').textContent.includes('of 4')")
    assert host.pool.stats().open == 0  # it holds no stream while nothing plays


def test_the_microphone_is_encoded_and_decoded(page):
    page.click("#microphone")
    says(page, "Listening to the microphone")
    assert page.is_visible("text=Use headphones")
    wait_played(page, 1.5)
    assert page.evaluate("() => fastmimi.player.stats.energy") > 1
    for name in ("original", "decoded", "codes"):
        assert len(np.unique(pixels(page, name, left=-50))) > 30
    assert page.inner_text("#latency").isdecimal()
    page.click("#stop")
    says(page, "Ready")


def test_the_slider_sets_how_many_codebooks_are_sent_back(page):
    received: list[protocol.Codes] = []
    sent: list[protocol.Codes] = []

    def note(found, kind):
        def take(data):
            if isinstance(message := kind(data), protocol.Codes):
                found.append(message)

        return take

    def watch(socket):
        socket.on("framereceived", note(received, protocol.from_server))
        socket.on("framesent", note(sent, protocol.from_client))

    page.on("websocket", watch)
    page.click("#sample")
    wait_played(page, 0.5)
    assert sent[-1].num_codebooks == CODEBOOKS
    page.focus("#codebooks")
    page.keyboard.press("Home")
    assert (page.inner_text("#kbps"), page.inner_text("#count")) == ("0.14", "1 of 16")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert (page.inner_text("#kbps"), page.inner_text("#count")) == ("0.41", "3 of 16")
    wait_played(page, 1.5)
    assert sent[-1].num_codebooks == 3
    for theirs, ours in zip(received, sent, strict=False):
        codes = protocol.codes_of_bytes(theirs.codes, theirs.num_codebooks)
        assert protocol.codes_to_bytes(codes[: ours.num_codebooks]) == ours.codes


def test_the_switch_chooses_what_is_heard(page):
    """The original that is heard is the file; the decoded is another sound; muted there is none."""
    clip, rate = soundfile.read(SAMPLE)
    page.click("#sample")
    wait_played(page, 0.5)
    page.evaluate(LISTEN)

    def heard(choose: str) -> np.ndarray:
        page.locator(choose).click(force=True)
        wait_played(page, played(page) + 0.5)  # the old sound has left the analyser, which holds 0.2 s
        return at_rate(page, page.evaluate(HEARD), rate)

    # of several listens, since a busy machine plays with gaps; what is decoded never comes as near
    assert max(offset(heard("input[value=original]"), clip)[1] for _ in range(4)) > 0.92
    assert 0.05 < max(offset(heard("input[value=decoded]"), clip)[1] for _ in range(2)) < 0.9
    assert np.abs(heard("#mute")).max() < 1e-3
    assert page.get_attribute("#decoded figcaption", "data-heard") == "muted"


def test_original_and_decoded_are_aligned(page, demo):
    """Each begins where the clip, and what the model makes of it, do."""
    clip = torch.from_numpy(soxr.resample(*soundfile.read(SAMPLE), demo.sample_rate)).float()
    expected = demo.decode(demo.encode(clip[None, None]))[0, 0].numpy()
    page.click("#sample")
    says(page, "Playing the sample")
    page.click("#stop")
    page.evaluate(RECORD)
    page.click("#sample")
    wait_played(page, 2)
    pushed = page.evaluate("() => pushed")
    original, decoded = (at_rate(page, pushed[name], demo.sample_rate) for name in ("original", "decoded"))
    first, last = demo.sample_rate // 2, demo.sample_rate * 3 // 2  # a second within both
    starts = [offset(x[first:last], y) for x, y in ((original, clip.numpy()), (decoded, expected))]
    assert min(similar for _, similar in starts) > 0.3  # resamplers differ, and hence some codes
    assert abs(starts[0][0] - starts[1][0]) < 0.002 * demo.sample_rate


def at_rate(page, samples: list[float], rate: int) -> np.ndarray:
    return soxr.resample(np.array(samples), page.evaluate("() => fastmimi.player.context.sampleRate"), rate)


def offset(x: np.ndarray, clip: np.ndarray) -> tuple[int, float]:
    """Where x is most similar to a part of a longer clip, and their correlation there."""
    products = scipy.signal.correlate(clip, x, "valid")
    energies = scipy.signal.correlate(clip**2, np.ones(len(x)), "valid")
    similar = products / np.sqrt(np.maximum(energies, 1e-6) * (x @ x + 1e-12))
    return int(similar.argmax()), float(similar.max())


@pytest.mark.parametrize("way", ["picker", "drop"])
def test_a_file_is_played_to_its_end(page, tmp_path, way):
    file = tone(tmp_path / "tone.wav", 1.0)
    if way == "picker":
        page.set_input_files("#picker", file)
    else:
        data = page.evaluate_handle(
            """(bytes) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "tone.wav"));
                return data;
            }""",
            list(file.read_bytes()),
        )
        page.dispatch_event("body", "drop", {"dataTransfer": data})
    says(page, "Playing tone.wav")
    page.wait_for_function(PLAYED, arg=0.98)
    says(page, "Ready")
    assert page.get_attribute("#file", "aria-pressed") == "false"


def test_a_file_that_is_no_audio_is_refused_in_a_sentence(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio")
    page.set_input_files("#picker", tmp_path / "notes.txt")
    says(page, "cannot decode that file")


def test_it_survives_a_restart_of_the_server(demo, blank, console):
    with Host(demo, Settings()) as first:
        blank.goto(first.url)
        says(blank, "Ready")
        blank.click("#microphone")
        wait_played(blank, 0.5)
    says(blank, "Reconnecting")
    before = played(blank)
    with Host(demo, Settings(), first.port):
        says(blank, "Listening to the microphone")
        wait_played(blank, before + 0.5)
        blank.close()  # before the server, which it would miss
    console[:] = [line for line in console if not NETWORK.search(line)]


def test_it_waits_for_a_free_stream_and_says_so(page, host):
    with ExitStack() as stack:
        client = Client(host.url)
        for _ in range(4):
            stack.enter_context(client.stream())
        page.click("#sample")
        says(page, "Reconnecting")
        says(page, "all 4 slots are in use")
    says(page, "Playing the sample")
    wait_played(page, 0.3)


def test_a_token_in_the_address_is_passed_on(demo, blank, console):
    with Host(demo, Settings(token=TOKEN)) as host:
        blank.goto(f"{host.url}/?token={TOKEN}")
        says(blank, "Ready")
        blank.click("#sample")
        wait_played(blank, 0.2)
        blank.goto(host.url)
        says(blank, "a token is needed")
        blank.close()
    console[:] = [line for line in console if not NETWORK.search(line)]


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#microphone")
    wait_played(page, 0.1)
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 360


def test_reduced_motion_stops_the_scrolling(page):
    """The pictures stand still and are written over: a column stays where it is."""
    page.emulate_media(reduced_motion="reduce")
    playwright.expect(page.locator(".time")).to_be_hidden()
    page.click("#sample")
    wait_played(page, 1)
    before, position = pixels(page, "codes", left=0), played(page)
    wait_played(page, position + 0.3)
    assert np.array_equal(pixels(page, "codes", left=0), before) and before.any()
    page.emulate_media(reduced_motion="no-preference")
    playwright.expect(page.locator(".time")).to_be_visible()
    wait_played(page, position + 0.6)
    assert not np.array_equal(pixels(page, "codes", left=0), before)


def test_every_control_is_reached_by_keyboard(page):
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(page.evaluate("() => document.activeElement.id || document.activeElement.value"))
    assert names == ["microphone", "sample", "file", "stop", "codebooks", "decoded", "mute"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowLeft")
    assert page.is_checked("input[value=original]")
    page.focus("#sample")
    page.keyboard.press("Space")
    says(page, "Playing the sample")
    unnamed = page.evaluate("() => [...document.querySelectorAll('input:not([hidden])')].filter(x => !x.labels.length)")
    assert unnamed == []


def test_the_page_runs_nothing_from_elsewhere(page, host):
    policy = page.request.get(host.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    addresses = page.evaluate("() => performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(addresses) > 10 and all(address.startswith(host.url) for address in addresses)
