"""`export_page`: a folder with the server's page, whose codec runs in the browser, in ONNX Runtime's WebAssembly.

The folder needs no server code: any host of static files serves it, such as `python -m http.server`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError, shown
from ..io.files import path_of
from ..models.codec import Codec
from .write import export_steps

PACKAGE = Path(__file__).parents[1]
SERVERS = ("server.js", "stream.js", "msgpack.js", "health.js")  # of the page, what talks to a server
SAMPLE = PACKAGE / "assets" / "198-209-0000.ogg"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of onnxruntime-web


def export_page(
    model: Codec, directory: str | Path, runtime: str | Path, *, name: str, weights: str = "float32", check: bool = True
) -> dict[str, Any]:
    """Write a page that encodes and decodes a microphone or a file in the browser, in a new directory.

    Args:
        model, directory, weights, check: as for `export_model`; the page has the ONNX files of steps only.
        runtime: the folder of the npm package onnxruntime-web, or a `node_modules` with it; two files are copied.
        name: of the model, shown on the page.

    Returns what `codec.json` holds. Raises InputError as `export_model` does, and where `runtime` is something else.
    """
    if not isinstance(name, str):
        raise InputError(f"name must be a string, got {shown(name)}")
    copies = [*runtime_files(runtime), SAMPLE, *(PACKAGE / "export" / "browser").iterdir()]
    copies += [path for path in (PACKAGE / "serve" / "page").iterdir() if path.name not in SERVERS]

    def add_page(folder: Path) -> None:
        for path in copies:
            shutil.copyfile(path, folder / ("sample.ogg" if path == SAMPLE else path.name))
        index = folder / "index.html"
        index.write_text(index.read_text(encoding="utf-8").replace("server.js", "browser.js"), encoding="utf-8")

    return export_steps(model, directory, weights=weights, check=check, described={"model": name}, add=add_page)


def runtime_files(folder: str | Path) -> list[Path]:
    """What a page needs of onnxruntime-web. Raises InputError if the folder is not of it."""
    folder = path_of(folder, "runtime")
    for place in (folder / "onnxruntime-web" / "dist", folder / "dist", folder):
        found = [place / name for name in RUNTIME]
        if all(path.is_file() for path in found):
            return found
    raise InputError(f"no onnxruntime-web in {folder}: npm install onnxruntime-web, and pass the node_modules")
