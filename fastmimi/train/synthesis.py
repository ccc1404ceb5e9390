"""Speech to train on, from nothing: free speech synthesisers read free text, in many voices, rates, pitches and rooms.

    apt-get install espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts fortunes
    python -m fastmimi.train.synthesis speech --hours 6 --texts /usr/share/games/fortunes

Each utterance is drawn from its own seed, so that the same arguments make the same set where the same synthesisers are
installed. A synthesiser that is missing is left out, by name.
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

PASSAGE = (60, 260)  # characters, 4 to 18 s
TEXTS = Path("/usr/share/common-licenses")  # on every Debian
ACCENTS = ["en", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "de", "fr", "es", "it", "nl",
           "pl", "pt", "sv", "fi", "cs", "ro", "hu", "id", "sw", "tr"]  # fmt: skip
VARIANTS = [*(f"m{i}" for i in range(1, 9)), *(f"f{i}" for i in range(1, 6)), "adam", "Alex", "Andrea", "anika",
            "Annie", "belinda", "boris", "caleb", "david", "Denis", "ed", "edward", "iven", "john", "klatt",
            "klatt2", "klatt4", "linda", "max", "Michael", "Mike", "norbert", "quincy", "rob", "robert",
            "shelby", "steph", "travis", "zac"]  # fmt: skip
FLITE = ["awb", "rms", "slt", "kal16"]


@dataclass(frozen=True)
class Synthesiser:
    """A program that reads a text aloud: how often it is drawn, and the command that writes `wave`."""

    program: str
    weight: float
    command: Callable[[np.random.Generator, Path, Path], list[str]]  # (draws, text, wave)


def _espeak(draw: np.random.Generator, text: Path, wave: Path) -> list[str]:
    voice = f"{draw.choice(ACCENTS)}+{draw.choice(VARIANTS)}"
    rate, pitch, gap = draw.integers(120, 210), draw.integers(20, 80), draw.integers(0, 4)
    return ["espeak-ng", "-v", voice, "-s", f"{rate}", "-p", f"{pitch}", "-g", f"{gap}", "-f", f"{text}",
            "-w", f"{wave}"]  # fmt: skip


def _flite(draw: np.random.Generator, text: Path, wave: Path) -> list[str]:
    stretch, pitch = f"duration_stretch={draw.uniform(0.8, 1.3):.3f}", f"f0_shift={draw.uniform(0.8, 1.3):.3f}"
    voice = draw.choice(FLITE)
    return ["flite", "-voice", voice, "--setf", stretch, "--setf", pitch, "-f", f"{text}", "-o", f"{wave}"]


def _festival(draw: np.random.Generator, text: Path, wave: Path) -> list[str]:
    voices = sorted(path.name for path in Path("/usr/share/festival/voices").glob("*/*") if path.is_dir())
    if not voices:
        raise InputError("festival has no voices: apt-get install festvox-kallpc16k festvox-us-slt-hts")
    voice, stretch = draw.choice(voices), draw.uniform(0.8, 1.3)
    return ["text2wave", "-eval", f"(voice_{voice})", "-eval", f"(Parameter.set 'Duration_Stretch {stretch:.3f})",
            "-o", f"{wave}", f"{text}"]  # fmt: skip


SYNTHESISERS = [
    Synthesiser("espeak-ng", 0.35, _espeak),
    Synthesiser("flite", 0.4, _flite),
    Synthesiser("text2wave", 0.25, _festival),
]


def passages(folder: Path) -> list[str]:
    """Passages of a few sentences, of the text files in a folder (or of one), in order."""
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
        raise InputError(f"{folder} holds no text of {PASSAGE[0]} characters or more to read")
    return found


def _cut(paragraph: str) -> Iterator[str]:
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


def recorded(draw: np.random.Generator, audio: np.ndarray, rate: int) -> np.ndarray:
    """Audio [N] as it may come out of a microphone: a room, a tilt of the spectrum, some noise, a level."""
    if draw.random() < 0.5:
        decay = np.exp(-np.arange(int(0.4 * rate)) / (rate * draw.uniform(0.01, 0.07)))
        room = draw.standard_normal(len(decay)) * decay * draw.uniform(0.02, 0.12)
        room[0] = 1
        audio = fftconvolve(audio, room)[: len(audio)]
    if draw.random() < 0.5:
        tilt = draw.uniform(-0.5, 0.5)
        audio = lfilter([1], [1, -tilt], audio) if tilt > 0 else lfilter([1, tilt], [1], audio)
    level = np.sqrt(np.mean(audio**2)) + 1e-9
    if draw.random() < 0.7:
        hiss = lfilter([1], [1, -draw.uniform(0, 0.95)], draw.standard_normal(len(audio)))
        audio = audio + hiss / hiss.std() * level * 10 ** (-draw.uniform(15, 50) / 20)
    audio = audio * 10 ** (draw.uniform(-32, -16) / 20) / level
    return audio * min(1, 0.95 / np.abs(audio).max())


def utterance(folder: Path, number: int, seed: int, texts: list[str], there: list[Synthesiser]) -> float:
    """Write utterance `number` to the folder; its seconds, 0 where the synthesiser would not read the text."""
    draw = np.random.default_rng([seed, number])
    text, weights = texts[draw.integers(len(texts))], np.array([synthesiser.weight for synthesiser in there])
    chosen = there[draw.choice(len(there), p=weights / weights.sum())]
    with tempfile.TemporaryDirectory() as name:
        script, wave = Path(name, "text"), Path(name, "wave")
        script.write_text(text, "ascii")
        done = subprocess.run(chosen.command(draw, script, wave), capture_output=True, check=False)
        if done.returncode or not wave.exists():
            return 0.0
        try:
            audio, rate = soundfile.read(wave, dtype="float64")
        except soundfile.LibsndfileError:  # it wrote nothing
            return 0.0
    if len(audio) < rate or np.abs(audio).max() < 1e-3:
        return 0.0
    # another length of the vocal tract, as a higher or lower sampling rate makes it
    said = round(rate * np.exp(draw.uniform(-0.18, 0.18))) if draw.random() < 0.8 else rate
    with replacing(folder / f"{number:06d}.flac") as part:
        soundfile.write(part, recorded(draw, audio, rate).astype(np.float32), said, "PCM_16", format="FLAC")
    return len(audio) / said


def synthesise(folder: Path, hours: float, seed: int = 0, texts: Path = TEXTS) -> float:
    """Fill a folder with FLAC files until it holds so many hours; those that are there count. Hours in it."""
    from rich.progress import track

    there = [synthesiser for synthesiser in SYNTHESISERS if shutil.which(synthesiser.program)]
    missing = [synthesiser.program for synthesiser in SYNTHESISERS if synthesiser not in there]
    if missing:
        typer.echo(f"left out, not installed: {', '.join(missing)}", err=True)
    if not there:
        raise InputError("no speech synthesiser is installed: apt-get install espeak-ng flite festival")
    folder.mkdir(parents=True, exist_ok=True)
    read, step, seconds, number = passages(texts), 32, 0.0, 0
    for percent in track(range(1, 101), description="Synthesising"):
        while seconds < 36 * hours * percent:
            with ThreadPoolExecutor() as pool:
                made = sum(pool.map(lambda n: _made(folder, n, seed, read, there), range(number, number + step)))
            if not made:
                programs = ", ".join(synthesiser.program for synthesiser in there)
                raise InputError(f"{step} texts in a row came to nothing: try {programs} by hand, and their voices")
            seconds += made
            number += step
    return seconds / 3600


def _made(folder: Path, number: int, seed: int, texts: list[str], there: list[Synthesiser]) -> float:
    path = folder / f"{number:06d}.flac"
    return soundfile.info(path).duration if path.exists() else utterance(folder, number, seed, texts, there)


def _main(
    folder: Annotated[Path, typer.Argument(help="Where the FLAC files go.")],
    hours: Annotated[float, typer.Option(help="How much speech.")] = 1.0,
    texts: Annotated[Path, typer.Option(help="A text file, or a folder of them, to read from.")] = TEXTS,
    seed: int = 0,
) -> None:
    typer.echo(f"{synthesise(folder, hours, seed, texts):.2f} hours of speech in {folder}")


if __name__ == "__main__":
    typer.run(_main)
