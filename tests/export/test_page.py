"""The page that needs no server, in Chromium: a folder of files, whose codec gives the model's codes and audio."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.errors import InputError
from fastmimi.export.page import RUNTIME, export_page, runtime_files

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
no_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="the page's tests need Chromium, which is not installed here"
)  # fmt: skip


def in_chromium(test):
    return pytest.mark.slow(no_chromium(test))


FAST = {"upsampling_ratios": [4, 3, 2], "num_hidden_layers": 1, "sliding_window": 12}  # frames of 48 samples, 2 ms
THROUGH = """async ([samples, used]) => {
    const { BrowserCodec } = await import("./browser-codec.js");
    const codec = new BrowserCodec(await (await fetch("codec.json")).json());
    const found = { codes: [], audio: [], first: [], used: [] };
    return new Promise((resolve, reject) => {
        codec.addEventListener("ready", () => {
            codec.numCodebooks = used;
            for (let at = 0; at < samples.length; at += 100) codec.push(Float32Array.from(samples.slice(at, at + 100)));
        });
        codec.addEventListener("codes", ({ detail }) => {
            found.codes.push([...detail.codes]);
            found.first.push(detail.firstFrame);
            found.used.push(detail.used);
        });
        codec.addEventListener("audio", ({ detail }) => {
            found.audio.push(...detail);
            if (found.audio.length === samples.length) resolve(found);
        });
        codec.addEventListener("lost", ({ detail }) => reject(new Error(detail.message)));
        codec.open();
    });
}"""


@pytest.fixture(scope="module")
def runtime(request) -> Path:
    """onnxruntime-web's files: of --onnxruntime-web, or of node_modules in the repository."""
    folder = Path(request.config.getoption("--onnxruntime-web") or ROOT / "node_modules")
    try:
        runtime_files(folder)
    except InputError as error:
        pytest.skip(f"the page's tests need onnxruntime-web: {error}")
    return folder


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, "--use-fake-device-for-media-stream"]
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve():
    """A function from a folder to the address at which it is served as it is."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def open_page(browser, serve):
    """A function that opens a folder's page. Nothing may be said in its console."""
    said: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    page.on("console", lambda message: said.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: said.append(str(error)))

    def go(folder: Path):
        page.goto(serve(folder))
        playwright.expect(page.get_by_role("status")).to_contain_text("Ready", timeout=30_000)
        return page

    yield go
    page.close()
    assert said == []


@pytest.fixture(scope="module")
def small(runtime, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, folder = small_model(**FAST), tmp_path_factory.mktemp("small") / "page"
    export_page(model, folder, runtime, name="a small one", check=False)
    return model, folder


@pytest.fixture(scope="module")
def demo(runtime, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder = tmp_path_factory.mktemp("demo") / "page"
    export_page(fastmimi.load("demo"), folder, runtime, name="demo", weights="float16", check=False)
    return folder


@in_chromium
@pytest.mark.parametrize("used", [6, 1, 3])
def test_the_codec_in_the_browser_is_the_model(small, open_page, used):
    """Beyond the attention window, in chunks that are no frames; a second stream begins anew."""
    model, folder = small
    page = open_page(folder)
    for seed in (1, 2):
        audio = noise(1, 1, 40 * 48, seed=seed)
        found = page.evaluate(THROUGH, [audio[0, 0].tolist(), used])
        codes = model.encode(audio)
        assert torch.equal(torch.tensor(found["codes"]).mT[None], codes)
        assert (found["first"], set(found["used"])) == (list(range(40)), {used})
        assert relative_error(torch.tensor(found["audio"])[None, None], model.decode(codes[:, :used])) < 1e-5


@in_chromium
def test_the_page_says_what_it_is_and_loads_nothing_from_elsewhere(small, open_page):
    _, folder = small
    page = open_page(folder)
    assert page.inner_text("#model") == "Model a small one · 24 kHz · 500 frames/s · 6 codebooks"
    assert page.is_hidden("#streams") and page.is_hidden("#demo-note")
    addresses = page.evaluate("() => performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(addresses) > 10 and all(address.startswith(page.url) for address in addresses)


@in_chromium
@pytest.mark.parametrize("source", ["#microphone", "#sample"])
def test_the_demo_sounds_and_shows_its_speed(demo, open_page, source):
    page = open_page(demo)
    page.click(source)
    page.wait_for_function("() => (fastmimi.player?.stats.played ?? 0) > 36_000")
    assert page.evaluate("() => fastmimi.player.stats.energy") > 0.1
    assert page.evaluate("() => fastmimi.player.context.sampleRate") == 24_000
    page.wait_for_function("() => Number(document.getElementById('factor').textContent) > 0")
    page.focus("#codebooks")
    page.keyboard.press("Home")
    assert (page.inner_text("#kbps"), page.inner_text("#count")) == ("0.14", "1 of 16")
    page.click("#stop")
    playwright.expect(page.get_by_role("status")).to_contain_text("Ready")


def test_a_folder_without_the_runtime_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^no onnxruntime-web in .*: npm install onnxruntime-web, and pass"):
        export_page(small_model(**FAST), tmp_path / "out", tmp_path, name="m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["onnxruntime-web/dist", "dist", "."])
def test_the_runtime_is_found(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name in RUNTIME:
        (tmp_path / place / name).touch()
    assert [path.name for path in runtime_files(tmp_path)] == list(RUNTIME)
