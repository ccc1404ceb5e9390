"""Synthetic training speech: free speech synthesizers read free texts, in many voices, rates, pitches and rooms.

    apt-get install espeak-ng flite festival festvox-{kallpc16k,kdlpc16k,us-slt-hts} fortunes
    apt-get install festvox-{czech-dita,czech-krb,czech-machac,czech-ph,italp16k,itapc16k,suopuhe-lj,suopuhe-mv}
    python -m fastmimi.train.synthesis speech --hours 6 --texts /usr/share/games/fortunes

Each utterance has its own random seed: the same arguments give the same data set wherever the same synthesizers are
installed. Synthesizers that are not installed are skipped, with a note that names them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer
from scipy.signal import fftconvolve, lfilter

from ..errors import InputError
from ..io.files import replacing

PASSAGE = (60, 260)  # shortest and longest passage in characters; spoken, 4 to 18 s
TEXTS = Path("/usr/share/common-licenses")  # present on every Debian system
ACCENTS = ["en", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "de", "fr", "es", "it", "nl",
           "pl", "pt", "sv", "fi", "cs", "ro", "hu", "id", "sw", "tr"]  # fmt: skip
VARIANTS = [*(f"m{i}" for i in range(1, 9)), *(f"f{i}" for i in range(1, 6)), "adam", "Alex", "Andrea", "anika",
            "Annie", "belinda", "boris", "caleb", "david", "Denis", "ed", "edward", "iven", "john", "klatt",
            "klatt2", "klatt4", "linda", "max", "Michael", "Mike", "norbert", "quincy", "rob", "robert",
            "shelby", "steph", "travis", "zac"]  # fmt: skip
FLITE = ["awb", "rms", "slt", "kal16"]


@dataclass(frozen=True)
class Synthesizer:
    """A text-to-speech program, the weight with which it is chosen, and its command line."""

    program: str
    weight: float
    command: Callable[[np.random.Generator, Path, Path], list[str]]  # (random generator, text file, output WAV file)


def _espeak(rng: np.random.Generator, text: Path, wave: Path) -> list[str]:
    voice = f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS)}"
    rate, pitch, gap = rng.integers(120, 210), rng.integers(20, 80), rng.integers(0, 4)
    return ["espeak-ng", "-v", voice, "-s", f"{rate}", "-p", f"{pitch}", "-g", f"{gap}", "-f", f"{text}",
            "-w", f"{wave}"]  # fmt: skip


def _flite(rng: np.random.Generator, text: Path, wave: Path) -> list[str]:
    stretch, pitch = f"duration_stretch={rng.uniform(0.8, 1.3):.3f}", f"f0_shift={rng.uniform(0.8, 1.3):.3f}"
    voice = rng.choice(FLITE)
    return ["flite", "-voice", voice, "--setf", stretch, "--setf", pitch, "-f", f"{text}", "-o", f"{wave}"]


def _festival(rng: np.random.Generator, text: Path, wave: Path) -> list[str]:
    voices = sorted(path.parent.name for path in Path("/usr/share/festival/voices").glob("*/*/festvox"))
    if not voices:
        raise InputError("festival has no voices: apt-get install festvox-kallpc16k festvox-us-slt-hts")
    voice, stretch = rng.choice(voices), rng.uniform(0.8, 1.3)
    return ["text2wave", "-eval", f"(voice_{voice})", "-eval", f"(Parameter.set 'Duration_Stretch {stretch:.3f})",
            "-o", f"{wave}", f"{text}"]  # fmt: skip


SYNTHESIZERS = [
    Synthesizer("espeak-ng", 0.2, _espeak),
    Synthesizer("flite", 0.3, _flite),
    Synthesizer("text2wave", 0.5, _festival),  # most of its voices join recordings of people
]


def passages(folder: Path) -> list[str]:
    """Passages of a few sentences from a text file, or from all text files below a folder, in order."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    found: list[str] = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for paragraph in re.split(r"\n\s*\n|\n%\n", text):
            found += _cut(re.sub(r"[^A-Za-z0-9,.;:?!' -]+", " ", paragraph))
    if not found:
        raise InputError(f"{folder} contains no text of at least {PASSAGE[0]} characters")
    return found


def _cut(paragraph: str) -> Iterator[str]:
    """Cut a paragraph at the ends of sentences into passages whose length is within `PASSAGE`."""
    passage = ""
    for sentence in re.split(r"(?<=[.?!;:]) ", re.sub(r"\s+", " ", paragraph).strip()):
        if len(passage) + len(sentence) > PASSAGE[1]:
            if len(passage) >= PASSAGE[0]:
                yield passage
            passage = ""
        if len(sentence) <= PASSAGE[1]:
            passage = f"{passage} {sentence}".strip()
    if len(passage) >= PASSAGE[0]:
        yield passage


def simulate_recording(rng: np.random.Generator, audio: np.ndarray, rate: int) -> np.ndarray:
    """Audio [N] as if recorded by a microphone: random reverberation, spectral tilt, noise and level."""
    if rng.random() < 0.5:
        decay = np.exp(-np.arange(int(0.4 * rate)) / (rate * rng.uniform(0.01, 0.07)))
        impulse_response = rng.standard_normal(len(decay)) * decay * rng.uniform(0.02, 0.12)
        impulse_response[0] = 1
        audio = fftconvolve(audio, impulse_response)[: len(audio)]
    if rng.random() < 0.5:
        tilt = rng.uniform(-0.5, 0.5)
        audio = lfilter([1], [1, -tilt], audio) if tilt > 0 else lfilter([1, tilt], [1], audio)
    level = np.sqrt(np.mean(audio**2)) + 1e-9
    if rng.random() < 0.4:
        hiss = lfilter([1], [1, -rng.uniform(0, 0.95)], rng.standard_normal(len(audio)))
        audio = audio + hiss / hiss.std() * level * 10 ** (-rng.uniform(20, 55) / 20)
    audio = audio * 10 ** (rng.uniform(-32, -16) / 20) / level
    return audio * min(1, 0.95 / np.abs(audio).max())


def write_utterance(folder: Path, number: int, seed: int, texts: list[str], available: list[Synthesizer]) -> float:
    """Write utterance `number` to the folder; return its seconds, or 0 if the synthesizer produced no speech."""
    rng = np.random.default_rng([seed, number])
    text, weights = texts[rng.integers(len(texts))], np.array([synthesizer.weight for synthesizer in available])
    chosen = available[rng.choice(len(available), p=weights / weights.sum())]
    with tempfile.TemporaryDirectory() as name:
        script, wave = Path(name, "text"), Path(name, "wave")
        script.write_text(text, "ascii")
        done = subprocess.run(chosen.command(rng, script, wave), capture_output=True, check=False)
        if done.returncode or not wave.exists():
            return 0.0
        try:
            audio, rate = soundfile.read(wave, dtype="float64")
        except soundfile.LibsndfileError:  # the synthesizer wrote no audio
            return 0.0
    if len(audio) < rate or np.abs(audio).max() < 1e-3:
        return 0.0
    # a different sample rate in the header shifts pitch and formants, as a longer or shorter vocal tract does
    header_rate = round(rate * np.exp(rng.uniform(-0.18, 0.18))) if rng.random() < 0.8 else rate
    with replacing(folder / f"{number:06d}.flac") as part:
        soundfile.write(
            part, simulate_recording(rng, audio, rate).astype(np.float32), header_rate, "PCM_16", format="FLAC"
        )
    return len(audio) / header_rate


def synthesize(folder: Path, hours: float, seed: int = 0, texts: Path = TEXTS) -> float:
    """Fill a folder with FLAC files until it holds `hours` of speech, and return the hours. Existing files count."""
    from rich.progress import track

    available = [synthesizer for synthesizer in SYNTHESIZERS if shutil.which(synthesizer.program)]
    missing = [synthesizer.program for synthesizer in SYNTHESIZERS if synthesizer not in available]
    if missing:
        typer.echo(f"not installed, skipped: {', '.join(missing)}", err=True)
    if not available:
        raise InputError("no speech synthesizer is installed: apt-get install espeak-ng flite festival")
    folder.mkdir(parents=True, exist_ok=True)
    all_passages, step, seconds, number = passages(texts), 32, 0.0, 0
    for percent in track(range(1, 101), description="Synthesizing"):
        while seconds < 36 * hours * percent:
            with ThreadPoolExecutor() as pool:
                numbers = range(number, number + step)
                written = sum(pool.map(lambda n: _utterance_seconds(folder, n, seed, all_passages, available), numbers))
            if not written:
                programs = ", ".join(synthesizer.program for synthesizer in available)
                raise InputError(f"no speech from {step} texts in a row: check {programs} and their voices")
            seconds += written
            number += step
    return seconds / 3600


def _utterance_seconds(folder: Path, number: int, seed: int, texts: list[str], available: list[Synthesizer]) -> float:
    """The seconds of utterance `number`, which is written if it does not exist."""
    path = folder / f"{number:06d}.flac"
    return soundfile.info(path).duration if path.exists() else write_utterance(folder, number, seed, texts, available)


def _main(
    folder: Annotated[Path, typer.Argument(help="Output folder for the FLAC files.")],
    hours: Annotated[float, typer.Option(help="Hours of speech.")] = 1.0,
    texts: Annotated[Path, typer.Option(help="A text file, or a folder of text files.")] = TEXTS,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    typer.echo(f"{synthesize(folder, hours, seed, texts):.2f} hours of speech in {folder}")


if __name__ == "__main__":
    typer.run(_main)
