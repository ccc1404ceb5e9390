"""`export_model`: a codec to files that run without fastmimi."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.weights import fingerprint, fingerprint_of_encoder
from ..errors import InputError, shown
from ..io.files import new_folder, path_of
from ..models import checks
from ..models.codec import Codec
from .check import check as check_file
from .formats import Format, format_of, next_of
from .frozen import WEIGHTS, rounded
from .modules import Port
from .programs import Program, programs

DESCRIPTION = "codec.json"
_log = logging.getLogger(__name__)


def export_model(
    model: Codec, directory: str | Path, *, format: str = "onnx", weights: str = "float32", check: bool = True
) -> dict[str, Any]:
    """Write a codec as files that run without fastmimi, in a new directory: whole audio, and steps of streams.

    `encoder` and `decoder` take whole audio of any length and batch size. `encoder_step` and `decoder_step` take the
    next frames of a batch of streams (any number; audio in whole frames, a last incomplete one is completed with zeros)
    and every tensor of their state, which starts as zeros, and return the new state beside the result. The encoder
    yields the model's `num_codebooks`; the decoder takes that many or fewer. `codec.json` beside them names inputs,
    outputs, states, shapes and dtypes, the sample rate in Hz, the frame size in samples and the fingerprints.

    Args:
        model: a codec that can stream; of one that has no encoder or no decoder, the other half is written.
        directory: does not exist yet, or is empty.
        format: "onnx" (needs `pip install 'fastmimi[onnx]'`), or "pt2" for programs of `torch.export`.
        weights: how the weights of layers are stored: "float32", "float16", or "int8" (the grid of
            `load(weights="int8")`). Everything computes in fp32, and codebooks are exact.
        check: run the files, where their runtime is installed, and compare them with the model whose weights are
            rounded alike.

    Returns what `codec.json` holds. Raises InputError for a wrong argument, a model that cannot stream, a directory
    that is not empty, or a missing package; AssertionError if a file does not compute what the model does.
    """
    return _export(model, directory, format, weights, check)


def export_steps(
    model: Codec, directory: str | Path, *, weights: str, check: bool, described: dict[str, Any],
    add: Callable[[Path], None],
) -> dict[str, Any]:  # fmt: skip
    """As `export_model`, in ONNX, without the files for whole audio.

    described: goes into `codec.json` too. add: called with the folder before it appears.
    """
    return _export(model, directory, "onnx", weights, check, only="_step", described=described, add=add)


@torch.inference_mode(False)
def _export(
    model: Codec, directory: str | Path, format: str, weights: str, check: bool, only: str = "",
    described: dict[str, Any] | None = None, add: Callable[[Path], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    if not isinstance(model, Codec):
        raise InputError(f"model must be a Mimi or a JodioModel, got {type(model).__name__}")
    if not model.num_codebooks:
        raise InputError(f"only a codec with codes can be exported, got a {type(model).__name__}")
    form = format_of(format)
    if not isinstance(weights, str) or weights not in WEIGHTS:
        raise InputError(f"weights must be {', '.join(WEIGHTS)}, got {shown(weights)}")
    checks.streamable(model.config)
    with new_folder(path_of(directory, "directory")) as folder:
        plain = rounded(model, weights) if check and form.runs_here else None
        files = {}
        for traced in programs(model, weights, only):
            path = folder / f"{traced.name}.{form.suffix}"
            form.write(traced, path)
            if plain is not None:
                check_file(traced, form.open(traced, path), plain)
            files[traced.name] = _described(traced, path, form)
            _log.info("exported %s: %.1f MB", path.name, path.stat().st_size / 1e6)
        description = {**(described or {}), **_description(model, format, form, weights, files)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if add is not None:
            add(folder)
    return description


def _description(model: Codec, format: str, form: Format, weights: str, files: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": format,
        **({} if form.opset is None else {"opset": form.opset}),
        "weights": weights,
        "sample_rate": model.sample_rate,
        "channels": model.config.audio_channels,
        "frame_size": model.frame_size,
        "frame_rate": model.frame_rate,
        "codebooks": model.num_codebooks,
        "semantic_codebooks": model.config.num_semantic_quantizers,
        "codebook_size": model.config.codebook_size,
        "fingerprint": fingerprint(model),
        **({} if model.encoder is None else {"fingerprint_of_encoder": fingerprint_of_encoder(model)}),
        "files": files,
    }


def _described(traced: Program, path: Path, form: Format) -> dict[str, Any]:
    described = {"file": path.name, "bytes": path.stat().st_size, "input": _port(traced.input)}
    described["output"] = _port(traced.output)
    if traced.state:  # in ONNX, a flat list of inputs and outputs; in a .pt2, a dictionary by the inputs' names
        described["state"] = [_port(port, next_of(port.name) if form.opset else None) for port in traced.state]
    return described


def _port(port: Port, output: str | None = None) -> dict[str, Any]:
    names = {"name": port.name} if output is None else {"name": port.name, "output": output}
    return {**names, "dtype": port.dtype, "shape": list(port.shape)}
