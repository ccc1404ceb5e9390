"""How good a codec sounds, in numbers: each file of a folder is encoded, decoded, and compared with itself.

SI-SDR (arXiv 1811.02508), multi-scale mel distance (losses.py), STOI and ESTOI (pystoi), wide-band PESQ (pesq), and how
much of each codebook is used. Numbers of a file are of its whole length (PESQ: the mean over pieces of 20 s); those of
the folder are means over its files.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
import torch

from ..errors import InputError
from ..io.audio import AudioFile, files_below, probe, read_blocks
from ..models.codec import Codec
from .losses import mel_distance

WIDE = 16_000  # Hz, of wide-band PESQ
PIECE = 20  # seconds that PESQ is given at once


@dataclass
class Result:
    """Of one file (or the mean over several) at one number of codebooks; None where a measure has no answer."""

    file: str
    codebooks: int
    si_sdr: float | None  # dB
    mel: float | None  # distance of decimal logarithms
    stoi: float | None  # 0 to 1
    estoi: float | None
    pesq: float | None  # MOS-LQO, 1 to 4.64


@dataclass
class Usage:
    """Of one codebook over all files."""

    level: int
    used: float  # share of the entries that occur
    perplexity: float  # entries that a uniform use of the same entropy would have


@dataclass
class Evaluation:
    model: str
    files: list[Result]
    means: list[Result]  # for each number of codebooks
    usage: list[Usage]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


Heard = Callable[[str, np.ndarray, dict[str, np.ndarray]], None]


def audio_files(folder: Path) -> dict[str, AudioFile]:
    """Of a folder and those below it, by their path in it, or the one file; InputError where one cannot be read."""
    files = {folder.name: folder} if folder.is_file() else {str(f.relative_to(folder)): f for f in files_below(folder)}
    if not files:
        raise InputError(f"{folder} holds no audio files")
    return {name: probe(path) for name, path in files.items()}


@torch.inference_mode()
def evaluate(
    codec: Codec, model: str, files: Mapping[str, AudioFile], counts: Sequence[int], heard: Heard | None = None
) -> Evaluation:
    """Measure each file at each number of codebooks; `heard` is given the codes [K, T] and every sound [N] by name."""
    results, counted = [], np.zeros((codec.total_codebooks, codec.config.codebook_size), np.int64)
    for name, file in files.items():
        blocks = read_blocks(file, codec.sample_rate, codec.config.audio_channels)
        audio = torch.from_numpy(np.concatenate([*blocks]).T.copy())[None].to(codec.device)  # [1, C, N]
        codes = codec.encode(audio.to(codec.dtype), num_codebooks=codec.total_codebooks)
        for level, row in enumerate(codes[0].cpu().numpy()):
            counted[level] += np.bincount(row, minlength=counted.shape[1])
        sounds = {"original": _mono(audio)}
        for count in counts:
            decoded = codec.decode(codes[:, :count])[..., : audio.shape[-1]].float()
            results.append(Result(name, count, **measures(audio, decoded, codec.sample_rate)))
            sounds[f"{count} codebooks"] = _mono(decoded)
        if heard is not None:
            heard(name, codes[0].cpu().numpy(), sounds)
    means = [_mean([r for r in results if r.codebooks == count], count) for count in counts]
    return Evaluation(model, results, means, usage_of(counted))


def _mono(audio: torch.Tensor) -> np.ndarray:
    """[1, C, N] -> [N]."""
    return audio[0].mean(dim=0).cpu().numpy()


def measures(real: torch.Tensor, fake: torch.Tensor, rate: int) -> dict[str, float | None]:
    """Of audio [1, C, N] and what came of it; speech measures are of the mean over the channels."""
    original, decoded = _mono(real).astype(np.float64), _mono(fake).astype(np.float64)
    return {
        "si_sdr": si_sdr(original, decoded),
        "mel": mel_distance(real, fake, rate).item() if real.shape[-1] > 1024 else None,
        "stoi": _stoi(original, decoded, rate, extended=False),
        "estoi": _stoi(original, decoded, rate, extended=True),
        "pesq": _pesq(original, decoded, rate),
    }


def si_sdr(original: np.ndarray, decoded: np.ndarray) -> float | None:
    """Scale-invariant signal-to-distortion ratio in dB of signals [N]; None where one is silence."""
    original, decoded = original - original.mean(), decoded - decoded.mean()
    power = np.dot(original, original)
    if power == 0 or not decoded.any():
        return None
    target = np.dot(decoded, original) / power * original
    left = np.sum((decoded - target) ** 2)
    return 10 * math.log10(max(np.dot(target, target), 1e-20) / max(left, 1e-20))


def _stoi(original: np.ndarray, decoded: np.ndarray, rate: int, extended: bool) -> float | None:
    from pystoi import stoi

    if not original.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of less than 30 frames of speech
        try:
            return float(stoi(original, decoded, rate, extended=extended))
        except (RuntimeWarning, ValueError):
            return None


def _pesq(original: np.ndarray, decoded: np.ndarray, rate: int) -> float | None:
    from pesq import PesqError, pesq

    if not original.any() or not decoded.any():
        return None
    first, second = (soxr.resample(sound, rate, WIDE) for sound in (original, decoded))
    scores = []
    # in pieces: beyond 50 utterances the library writes over its own memory
    for start in range(0, len(first), PIECE * WIDE):
        piece = slice(start, start + PIECE * WIDE)
        with suppress(PesqError, ValueError):  # no speech in it, or no numbers
            scores.append(float(pesq(WIDE, first[piece], second[piece], "wb")))
    return sum(scores) / len(scores) if scores else None


def usage_of(counted: np.ndarray) -> list[Usage]:
    """Of how often each entry occurred [K, S]."""
    found = []
    for level, counts in enumerate(counted, 1):
        shares = counts[counts > 0] / max(counts.sum(), 1)
        found.append(Usage(level, float((counts > 0).mean()), float(np.exp(-(shares * np.log(shares)).sum()))))
    return found


def _mean(results: Sequence[Result], count: int) -> Result:
    def mean(name: str) -> float | None:
        values = [getattr(r, name) for r in results if getattr(r, name) is not None]
        return sum(values) / len(values) if values else None

    names = ("si_sdr", "mel", "stoi", "estoi", "pesq")
    return Result(f"mean of {len(results)}", count, **{name: mean(name) for name in names})
