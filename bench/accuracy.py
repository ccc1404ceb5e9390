"""Accuracy of bf16 and int8 weights relative to fp32: percentage of equal codes, and signal-to-error ratio of audio.

    python bench/accuracy.py

compares our bf16, our int8 weights and transformers' bf16 with our fp32, on random weights, for noise and for speech,
and weights that exports store small.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

import fastmimi
from fastmimi.devtools.testing import noise
from fastmimi.export.frozen import rounded
from fastmimi.io.audio import probe, read_blocks

CLIP = Path(__file__).parent.parent / "fastmimi" / "assets" / "198-209-0000.ogg"


def speech() -> Tensor:
    blocks = [torch.from_numpy(block[:, 0]) for block in read_blocks(probe(CLIP), 24_000)]
    return torch.cat(blocks)[None, None, :240_000]


def accuracy(folder: Path) -> dict[str, dict[str, float]]:
    """For each codec and test signal, the percentage of equal codes and the signal-to-error ratio in dB."""
    plain = peers.load("fastmimi", folder)
    others = {name: peers.load(name, folder) for name in ("fastmimi bf16", "fastmimi int8")}
    if peers.load("transformers", folder) is not None:
        others["transformers bf16"] = peers._transformers(folder, torch.bfloat16)
    found: dict[str, dict[str, float]] = {name: {} for name in others}
    for signal, audio in (("noise", noise(4, 1, 240_000, scale=0.1)), ("speech", speech())):
        codes = plain.encode(audio)
        truth = plain.decode(codes)
        for name, codec in others.items():
            found[name] |= agreement(codec, signal, audio, codes, truth)
    return found


def agreement(codec: Any, signal: str, audio: Tensor, codes: Tensor, truth: Tensor) -> dict[str, float]:
    """How near a codec comes to the codes of the audio, and to the audio of the codes."""
    error = (codec.decode(codes).float() - truth).square().sum()
    return {
        f"{signal}: equal codes, %": (codec.encode(audio) == codes).float().mean().item() * 100,
        f"{signal}: audio, dB": (10 * torch.log10(truth.square().sum() / error)).item(),
    }


def exported() -> dict[str, dict[str, float]]:
    """The same of weights as `fastmimi export --weights` stores them, for speech and 8 codebooks."""
    audio, found = speech(), {}
    for name in ("demo", "random:0"):
        plain = fastmimi.load(name, num_codebooks=8)
        codes = plain.encode(audio)
        truth = plain.decode(codes)
        for kind in ("float16", "int8"):
            found[f"{name}, {kind}"] = agreement(rounded(plain, kind), "speech", audio, codes, truth)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, values in (accuracy(peers.weights(Path(folder))) | exported()).items():
            print(f"{name:18}", ", ".join(f"{what} {value:.1f}" for what, value in values.items()))
