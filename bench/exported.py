"""Speed of exported files beside the native model, in ONNX Runtime, OpenVINO and Chromium.

    fastmimi export demo exported --codebooks 8
    fastmimi export demo page --codebooks 8 --page node_modules
    python bench/exported.py demo exported --threads 1 --page page

Times in turn, in this process: 10 s of audio at once, and streams, one 80 ms frame after another; both directions. What
is not installed is left out. Chromium comes after them, with one thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

import torch
from peers import open_in_onnxruntime, open_in_openvino, stateful

import fastmimi
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.models.codec import Codec

SECONDS = 10
IN_CHROMIUM = """async (samples) => {
    const { BrowserCodec, speed } = await import("./browser-codec.js");
    const codec = new BrowserCodec(await (await fetch("codec.json")).json());
    let left = samples;
    return new Promise((resolve, reject) => {
        codec.addEventListener("ready", () => codec.push(new Float32Array(samples).map(() => Math.random() - 0.5)));
        codec.addEventListener("audio", ({ detail }) => (left -= detail.length) === 0 && resolve(speed()));
        codec.addEventListener("lost", ({ detail }) => reject(new Error(detail.message)));
        codec.open();
    });
}"""
Work = dict[str, Callable[[], object]]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def in_chromium(folder: Path, rate: int) -> float | None:
    """Times real time, of both directions together."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None or find_spec("playwright") is None:
        return None
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        speed = page.evaluate(IN_CHROMIUM, SECONDS * rate)
        browser.close()
    server.shutdown()
    return speed


def works(runs: dict[str, Callable[[Any], Any]], audio: Any, codes: Any, frame_size: int) -> Work:
    """What is timed of a runtime, from its four functions by the files' names."""
    return {
        "encode 10 s": lambda: runs["encoder"](audio),
        "decode 10 s": lambda: runs["decoder"](codes),
        "encode a frame": lambda: runs["encoder_step"](audio[..., :frame_size]),
        "decode a frame": lambda: runs["decoder_step"](codes[..., :1]),
    }


def native(model: Codec) -> dict[str, Callable[[Any], Any]]:
    state = model.new_state()
    model.warm_up(state)
    return {
        "encoder": model.encode,
        "decoder": model.decode,
        "encoder_step": partial(model.encode, state=state),
        "decoder_step": partial(model.decode, state=state),
    }


def timed(everything: dict[str, Work], what: str, rounds: int) -> dict[str, list[float]]:
    """ms of each runtime, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in everything}
    repeats = 1 if what.endswith("10 s") else 12
    for _ in range(rounds):
        for name, work in everything.items():
            work[what]()
            start = perf_counter()
            for _ in range(repeats):
                work[what]()
            times[name].append((perf_counter() - start) / repeats * 1000)
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="of `fastmimi export`, of that model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", type=Path, help="of `fastmimi export --page`, for Chromium")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    description = json.loads((args.folder / "codec.json").read_text())
    model = fastmimi.load(args.model, num_codebooks=description["codebooks"])
    audio = noise(1, 1, SECONDS * model.sample_rate)
    codes = model.encode(audio)
    everything = {"native": works(native(model), audio, codes, model.frame_size)}
    for name, open_file in (("onnxruntime", open_in_onnxruntime), ("openvino", open_in_openvino)):
        if find_spec(name) is not None:
            runs = {
                file: stateful(described, open_file(args.folder / described["file"], args.threads))
                for file, described in description["files"].items()
            }
            equal = (torch.from_numpy(runs["encoder"](audio.numpy())) == codes).float().mean()
            error = relative_error(torch.from_numpy(runs["decoder"](codes.numpy())), model.decode(codes))
            print(f"{name}: {equal:.2%} of the codes equal, audio to {error:.0e} of the peak", flush=True)
            everything[name] = works(runs, audio.numpy(), codes.numpy(), model.frame_size)
    for what in everything["native"]:
        times = timed(everything, what, args.rounds)
        cells = (f"{name} {statistics.median(t):.2f} ({min(t):.2f}-{max(t):.2f})" for name, t in times.items())
        print(f"{what}: {', '.join(cells)} ms", flush=True)
    if args.page is not None:
        speed = in_chromium(args.page, model.sample_rate)
        print("browser: not here" if speed is None else f"browser: encode and decode a frame {80 / speed:.1f} ms")


if __name__ == "__main__":
    main()
