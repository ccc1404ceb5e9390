"""Objective quality of a codec: encode and decode every file of a folder, and compare the result with the original.

The metrics are SI-SDR (arXiv 1811.02508), multi-scale mel distance (losses.py), STOI and ESTOI (pystoi), wide-band PESQ
(pesq), and the usage and perplexity of each codebook. The metrics of a file are computed over its whole length (PESQ:
the mean over segments of 20 s), those of the folder are means over its files.
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
from ..models.usage import Usage, usage_from_histograms
from .losses import mel_distance

PESQ_RATE = 16_000  # Hz, the sample rate of wide-band PESQ
PESQ_SEGMENT = 20  # seconds


@dataclass
class Result:
    """Metrics of one file (or means over files) with one number of codebooks; None where a metric is undefined."""

    file: str
    codebooks: int
    si_sdr: float | None  # dB
    mel: float | None  # mean absolute difference of log10 mel spectra
    stoi: float | None  # 0 to 1
    estoi: float | None
    pesq: float | None  # MOS-LQO, 1 to 4.64


@dataclass
class Evaluation:
    """All results of `evaluate`."""

    model: str
    files: list[Result]
    means: list[Result]  # one for each number of codebooks
    usage: list[Usage]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


OnFile = Callable[[str, np.ndarray, dict[str, np.ndarray]], None]


def audio_files(folder: Path) -> dict[str, AudioFile]:
    """The audio files of a folder, scanned recursively, by relative path; or the single file that is given.

    Raises InputError if there are none, or if one cannot be read.
    """
    files = {folder.name: folder} if folder.is_file() else {str(f.relative_to(folder)): f for f in files_below(folder)}
    if not files:
        raise InputError(f"{folder} holds no audio files")
    return {name: probe(path) for name, path in files.items()}


@torch.inference_mode()
def evaluate(
    codec: Codec, model: str, files: Mapping[str, AudioFile], counts: Sequence[int], on_file: OnFile | None = None
) -> Evaluation:
    """Measure each file with each number of codebooks.

    `on_file(name, codes, sounds)` is called after each file with its codes [K, T] and a dictionary of the original and
    every decoded signal [N].
    """
    results, histograms = [], np.zeros((codec.total_codebooks, codec.config.codebook_size), np.int64)
    for name, file in files.items():
        blocks = read_blocks(file, codec.sample_rate, codec.config.audio_channels)
        audio = torch.from_numpy(np.concatenate([*blocks]).T.copy())[None].to(codec.device)  # [1, C, N]
        codes = codec.encode(audio.to(codec.dtype), num_codebooks=codec.total_codebooks)
        for level, row in enumerate(codes[0].cpu().numpy()):
            histograms[level] += np.bincount(row, minlength=histograms.shape[1])
        sounds = {"original": _mono(audio)}
        for count in counts:
            decoded = codec.decode(codes[:, :count])[..., : audio.shape[-1]].float()
            results.append(Result(name, count, **measures(audio, decoded, codec.sample_rate)))
            sounds[f"{count} codebooks"] = _mono(decoded)
        if on_file is not None:
            on_file(name, codes[0].cpu().numpy(), sounds)
    means = [mean_of([r for r in results if r.codebooks == count], count) for count in counts]
    return Evaluation(model, results, means, usage_from_histograms(histograms))


def _mono(audio: torch.Tensor) -> np.ndarray:
    """The mean over channels: [1, C, N] -> [N]."""
    return audio[0].mean(dim=0).cpu().numpy()


def measures(real: torch.Tensor, fake: torch.Tensor, rate: int) -> dict[str, float | None]:
    """All metrics of decoded audio against the original, both [1, C, N]; all but mel on the mean of the channels."""
    original, decoded = _mono(real).astype(np.float64), _mono(fake).astype(np.float64)
    return {
        "si_sdr": si_sdr(original, decoded),
        "mel": mel_distance(real, fake, rate).item() if real.shape[-1] > 1024 else None,
        "stoi": _stoi(original, decoded, rate, extended=False),
        "estoi": _stoi(original, decoded, rate, extended=True),
        "pesq": _pesq(original, decoded, rate),
    }


def si_sdr(original: np.ndarray, decoded: np.ndarray) -> float | None:
    """Scale-invariant signal-to-distortion ratio in dB of signals [N]; None if either is silent."""
    original, decoded = original - original.mean(), decoded - decoded.mean()
    power = np.dot(original, original)
    if power == 0 or not decoded.any():
        return None
    target = np.dot(decoded, original) / power * original
    distortion = np.sum((decoded - target) ** 2)
    return 10 * math.log10(max(np.dot(target, target), 1e-20) / max(distortion, 1e-20))


def _stoi(original: np.ndarray, decoded: np.ndarray, rate: int, extended: bool) -> float | None:
    from pystoi import stoi

    if not original.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns if there are fewer than 30 frames of speech
        try:
            return float(stoi(original, decoded, rate, extended=extended))
        except (RuntimeWarning, ValueError):
            return None


def _pesq(original: np.ndarray, decoded: np.ndarray, rate: int) -> float | None:
    from pesq import PesqError, pesq

    if not original.any() or not decoded.any():
        return None
    first, second = (soxr.resample(sound, rate, PESQ_RATE) for sound in (original, decoded))
    scores = []
    # in segments: with more than 50 utterances the library overruns its buffers
    for start in range(0, len(first), PESQ_SEGMENT * PESQ_RATE):
        segment = slice(start, start + PESQ_SEGMENT * PESQ_RATE)
        with suppress(PesqError, ValueError):  # no speech in the segment, or NaN
            scores.append(float(pesq(PESQ_RATE, first[segment], second[segment], "wb")))
    return sum(scores) / len(scores) if scores else None


def mean_of(results: Sequence[Result], count: int) -> Result:
    def mean(name: str) -> float | None:
        values = [getattr(r, name) for r in results if getattr(r, name) is not None]
        return sum(values) / len(values) if values else None

    names = ("si_sdr", "mel", "stoi", "estoi", "pesq")
    return Result(f"mean of {len(results)}", count, **{name: mean(name) for name in names})
