"""Quality of models on the evaluation clips, beside Opus at 6 kbps and Codec 2, as a Markdown table.

    apt-get install opus-tools codec2
    python bench/quality.py CLIPS --model demo --model runs/speech/model --codebooks 4 --codebooks 8

measures every clip of the folder with each model and number of codebooks: STOI, ESTOI, wide-band PESQ, SI-SDR and mel
distance (fastmimi/train/evaluate.py). Codecs whose programs are not installed are left out, with a note. Opus and
Codec 2 delay: their output is aligned to the original first. Codec 2 codes 8 kHz; the other half of the band is lost.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import torch
import typer
from scipy.signal import correlate

import fastmimi
from fastmimi.errors import InputError
from fastmimi.io.audio import AudioFile, read_blocks
from fastmimi.train.evaluate import Result, audio_files, evaluate, mean_of, measures

RATE = 24_000  # Hz, at which all are measured
OPUS_RATE = 16_000  # Hz, of the clips
CODEC2_RATE = 8_000  # Hz
LONGEST_DELAY = 0.2  # seconds


@dataclass(frozen=True)
class Coded:
    """The results of one model or codec with one bit rate."""

    name: str
    bits: float  # per second
    results: list[Result]


@dataclass(frozen=True)
class Rival:
    """A codec that consists of programs: `code` takes audio [N] at `rate` Hz and a folder for its files."""

    name: str
    programs: tuple[str, ...]
    rate: int
    code: Callable[[np.ndarray, Path], tuple[np.ndarray, float]]  # gives decoded audio, and bits per second


def opus(kbps: float) -> Rival:
    """Opus; its bits are those of its packets, without Ogg's."""

    def code(audio: np.ndarray, folder: Path) -> tuple[np.ndarray, float]:
        soundfile.write(folder / "in.wav", audio, OPUS_RATE)
        encode = ["opusenc", "--bitrate", f"{kbps:g}", "--speech", folder / "in.wav", folder / "coded.opus"]
        # opusenc: "Bitrate: 5.5kbit/s (without overhead)"
        said = subprocess.run(encode, check=True, capture_output=True, text=True).stderr
        decode = ["opusdec", "--quiet", "--rate", f"{OPUS_RATE}", folder / "coded.opus", folder / "out.wav"]
        subprocess.run(decode, check=True, capture_output=True)
        found = re.search(r"([\d.]+) ?kbit/s \(without overhead\)", said)
        return soundfile.read(folder / "out.wav")[0], float(found[1]) * 1000 if found else float("nan")

    return Rival(f"Opus at {kbps:g} kbps", ("opusenc", "opusdec"), OPUS_RATE, code)


def codec2(bits: int) -> Rival:
    """Codec 2, which has 8 kHz."""

    def code(audio: np.ndarray, folder: Path) -> tuple[np.ndarray, float]:
        pcm = folder / "in.raw"
        pcm.write_bytes((audio.clip(-1, 1) * 32767).astype("<i2").tobytes())
        subprocess.run(["c2enc", f"{bits}", pcm, folder / "coded"], check=True, capture_output=True)
        subprocess.run(["c2dec", f"{bits}", folder / "coded", folder / "out.raw"], check=True, capture_output=True)
        decoded = np.frombuffer((folder / "out.raw").read_bytes(), "<i2") / 32768
        return decoded, (folder / "coded").stat().st_size * 8 / (len(audio) / CODEC2_RATE)

    return Rival(f"Codec 2 at {bits} bps", ("c2enc", "c2dec"), CODEC2_RATE, code)


RIVALS = [opus(6), codec2(2400), codec2(1200)]


def aligned(original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Decoded audio [M], shifted to where it correlates best with the original [N], within `LONGEST_DELAY`: [N]."""
    longest = round(LONGEST_DELAY * RATE)
    correlation = correlate(decoded, original, "full", "fft")[len(original) - 1 - longest :][: 2 * longest + 1]
    shift = int(correlation.argmax()) - longest
    decoded = np.pad(decoded, (max(-shift, 0), 0))[max(shift, 0) :]
    return np.pad(decoded, (0, max(0, len(original) - len(decoded))))[: len(original)]


def clip(file: AudioFile) -> np.ndarray:
    """A clip at `RATE`, mono: [N]."""
    return np.concatenate([*read_blocks(file, RATE, 1)])[:, 0]


def rival(codec: Rival, files: dict[str, AudioFile]) -> Coded:
    """The results of a codec that consists of programs."""
    results, bits = [], []
    for name, file in files.items():
        original = clip(file)
        with tempfile.TemporaryDirectory() as folder:
            decoded, found = codec.code(soxr.resample(original, RATE, codec.rate), Path(folder))
        decoded = aligned(original, soxr.resample(decoded, codec.rate, RATE).astype(np.float32))
        pair = (torch.from_numpy(sound)[None, None] for sound in (original, decoded))
        results.append(Result(name, 0, **measures(*pair, RATE)))
        bits.append(found)
    return Coded(codec.name, sum(bits) / len(bits), results)


def model(name: str, counts: Sequence[int], files: dict[str, AudioFile]) -> list[Coded]:
    """The results of a model with each number of codebooks that it has."""
    codec = fastmimi.load(name)
    counts = [count for count in counts if count <= codec.total_codebooks] or [codec.total_codebooks]
    found = evaluate(codec, name, files, counts).files
    bits = codec.config.frame_rate * np.log2(codec.config.codebook_size)
    return [
        Coded(f"{name}, {count} codebooks", count * bits, [result for result in found if result.codebooks == count])
        for count in counts
    ]


def table(coded: Sequence[Coded]) -> str:
    """A Markdown table of the means, and one of every clip."""
    head = " | bits per second | STOI | ESTOI | PESQ | SI-SDR | mel |\n|---|---|---|---|---|---|---|\n"
    means = [_row(one, mean_of(one.results, 0)) for one in coded]
    clips = [_row(one, result, f", {result.file}") for one in coded for result in one.results]
    return f"| mean{head}" + "\n".join(means) + f"\n\n| clip{head}" + "\n".join(clips) + "\n"


def _row(one: Coded, result: Result, clip: str = "") -> str:
    digits = {"stoi": 3, "estoi": 3, "pesq": 2, "si_sdr": 1, "mel": 3}
    values = [(getattr(result, name), places) for name, places in digits.items()]
    cells = ["-" if value is None else f"{value:.{places}f}" for value, places in values]
    return f"| {one.name}{clip} | {one.bits:.0f} | " + " | ".join(cells) + " |"


def main(
    clips: Annotated[Path, typer.Argument(help="A folder of clips, or one clip.")],
    models: Annotated[list[str], typer.Option("--model", help="A model, as for `fastmimi.load`.")] = ["demo"],  # noqa: B006
    codebooks: Annotated[list[int], typer.Option(help="Numbers of codebooks.")] = [8, 16],  # noqa: B006
    rivals: Annotated[bool, typer.Option(help="Measure Opus and Codec 2 too.")] = True,
) -> None:
    if min(codebooks) < 1:
        raise InputError(f"codebooks must be at least 1, got {min(codebooks)}")
    files = audio_files(clips)
    coded = [one for name in models for one in model(name, codebooks, files)]
    for codec in RIVALS if rivals else []:
        missing = [program for program in codec.programs if shutil.which(program) is None]
        if missing:
            typer.echo(f"{codec.name} is left out: {' and '.join(missing)} not installed", err=True)
        else:
            coded.append(rival(codec, files))
    typer.echo(table(coded))


if __name__ == "__main__":
    typer.run(main)
