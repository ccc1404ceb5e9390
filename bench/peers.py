"""The codecs that are compared, all with the same weights: ours, transformers', moshi's and rustymimi's.

Each is a `Codec` of functions on tensors. `load` gives None for a peer that is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmimi

CODEBOOKS = 8
FRAME = 1920  # samples, 80 ms
NAMES = ("fastmimi", "fastmimi bf16", "fastmimi int8", "transformers", "moshi", "rustymimi")


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
    codecs = (_ours, _bf16, _int8, _transformers, _moshi, _rustymimi)
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
