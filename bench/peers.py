"""The codecs that are compared, all with the same weights: ours, those of others, and our exported files in runtimes.

Each is a `Codec` of functions on tensors, for as many threads as PyTorch has when it is loaded. `load` gives None for a
peer that is not installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmimi

PACKAGE = Path(fastmimi.__file__).parent
CODEBOOKS = 8
FRAME = 1920  # samples, 80 ms
NAMES = (
    "fastmimi", "fastmimi bf16", "fastmimi int8", "onnxruntime", "openvino", "transformers", "moshi", "rustymimi",
)  # fmt: skip
Run = Callable[[dict[str, Any]], list[Any]]  # an exported file: inputs by name -> outputs in order, NumPy arrays


@dataclass
class Codec:
    """One codec.

    encode: audio [B, 1, N] -> codes [B, K, T]; decode: the inverse. stream(batch): a context manager that yields two
    functions, which encode and decode the next frames of a stream; None if the codec cannot stream in both directions.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    stream: Callable[[int], Any] | None


def weights(folder: Path) -> Path:
    """Write a checkpoint with random weights in both layouts to the folder, unless it exists; return the folder."""
    if not (folder / "kyutai.safetensors").exists():
        mimi = fastmimi.load("random:0")
        fastmimi.save_pretrained(mimi, folder)
        fastmimi.save_kyutai(mimi, folder / "kyutai.safetensors")
    return folder


def load(name: str, folder: Path) -> Codec | None:
    """The codec, or None if it is not installed."""
    codecs = (_ours, _bf16, _int8, _onnxruntime, _openvino, _transformers, _moshi, _rustymimi)
    try:
        return dict(zip(NAMES, codecs, strict=True))[name](folder)
    except ImportError:
        return None


def _ours(folder: Path, dtype: torch.dtype = torch.float32, weights: str | None = None) -> Codec:
    mimi = fastmimi.load(folder, num_codebooks=CODEBOOKS, dtype=dtype, weights=weights)

    @contextmanager
    def stream(batch: int) -> Iterator[Any]:
        state = mimi.new_state(batch)
        mimi.warm_up(state)
        yield lambda x: mimi.encode(x.to(dtype), state=state), lambda codes: mimi.decode(codes, state=state)

    return Codec(lambda x: mimi.encode(x.to(dtype)), mimi.decode, stream)


def _bf16(folder: Path) -> Codec:
    return _ours(folder, torch.bfloat16)


def _int8(folder: Path) -> Codec:
    return _ours(folder, weights="int8")


def open_in_onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options)
    return lambda inputs: session.run(None, inputs)


def open_in_openvino(file: Path, threads: int) -> Run:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    return lambda inputs: [*compiled(inputs).values()]


def stateful(described: dict[str, Any], run: Run, batch: int = 1) -> Callable[[Any], Any]:
    """A function of the input of an exported file alone, which codec.json describes; the state of streams is kept."""
    state = {
        port["name"]: torch.zeros([batch, *port["shape"][1:]], dtype=getattr(torch, port["dtype"])).numpy()
        for port in described.get("state", ())
    }

    def call(x: Any) -> Any:
        y, *new = run({described["input"]["name"]: x, **state})
        state.update(zip(state, new, strict=True))
        return y

    return call


def exported(folder: Path) -> Path:
    """Our model as ONNX, written on first use and after changes of what is exported; it takes a minute or two."""
    sources = [path for name in ("export", "models", "reference") for path in sorted((PACKAGE / name).glob("*.py"))]
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(path.read_bytes() for path in sources))
    files = PACKAGE.parent / "out" / f"exported-{digest.hexdigest()[:12]}"
    if not files.exists():
        fastmimi.export_model(fastmimi.load(folder, num_codebooks=CODEBOOKS), files, check=False)
    return files


def _exported(open_file: Callable[[Path, int], Run], folder: Path) -> Codec:
    described = json.loads((exported(folder) / "codec.json").read_text())["files"]
    runs: dict[str, Run] = {}

    def function(name: str, batch: int = 1) -> Callable[[Tensor], Tensor]:
        if name not in runs:
            runs[name] = open_file(exported(folder) / described[name]["file"], torch.get_num_threads())
        call = stateful(described[name], runs[name], batch)
        return lambda x: torch.from_numpy(call(x.numpy()))

    @contextmanager
    def stream(batch: int) -> Iterator[Any]:
        yield function("encoder_step", batch), function("decoder_step", batch)

    return Codec(function("encoder"), function("decoder"), stream)


def _onnxruntime(folder: Path) -> Codec:
    import onnxruntime  # noqa: F401

    return _exported(open_in_onnxruntime, folder)


def _openvino(folder: Path) -> Codec:
    import openvino  # noqa: F401

    return _exported(open_in_openvino, folder)


def _transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Codec:
    from transformers import MimiModel

    model = MimiModel.from_pretrained(folder, dtype=dtype).eval()
    return Codec(
        lambda x: model.encode(x.to(dtype), num_quantizers=CODEBOOKS).audio_codes,
        lambda codes: model.decode(codes).audio_values,
        None,  # its decoder keeps no state
    )


def _moshi(folder: Path) -> Codec:
    from moshi.models.loaders import get_mimi

    model = get_mimi(folder / "kyutai.safetensors", num_codebooks=CODEBOOKS)

    @contextmanager
    def stream(batch: int) -> Iterator[Any]:
        with model.streaming(batch):
            yield model.encode, model.decode

    return Codec(model.encode, model.decode, stream)


def _rustymimi(folder: Path) -> Codec:
    from rustymimi import Tokenizer

    tokenizer = Tokenizer(str(folder / "kyutai.safetensors"), num_codebooks=CODEBOOKS)
    return Codec(
        lambda x: torch.from_numpy(tokenizer.encode(x.numpy()).astype("int64")),
        lambda codes: torch.from_numpy(tokenizer.decode(codes.numpy().astype("uint32"))),
        None,
    )
