"""Training speech recorded from people: Debian packages with recordings under free licences, cut and joined to files.

    apt-get update && apt-get install ffmpeg    # ffmpeg decodes G.722
    python -m fastmimi.train.recordings speech/recordings --packages out/debian

Packages are fetched by name with apt-get and unpacked into the folder `--packages`; none is installed. Clips without
energy above 5.5 kHz are left out, since they were recorded or stored at 8 kHz; so is silence. The clips of one voice
are joined to files of about 15 s, mono FLAC at 24 kHz. Each file has augmented copies, with shifted pitch and formants,
reverberation and background noise. manifest.jsonl lists every file with its package, licence, language,
voice and seconds; README.md the hours by package, voice and licence.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import typer
from scipy.ndimage import binary_dilation

from ..errors import InputError, shown
from ..io.files import new_folder, replacing
from .synthesis import simulate_recording

RATE = 24_000  # Hz, of the files
SECONDS = 15  # length from which on a file of joined clips is complete
SHORTEST = 0.25  # seconds of speech in a clip
PAUSE = 0.15  # seconds of silence that stay at each end of a clip and beside each word
SILENCE = -42  # dB from a clip's loud frames, below which a frame is silence
WIDE_BAND = (5500, 7000)  # Hz
WIDE_LEVEL = -45  # dB from the speech band, the least that the loudest frames of a wide-band clip have in WIDE_BAND
SPEECH_BAND = (100, 4000)  # Hz
FRAME = 0.03  # seconds


@dataclass(frozen=True)
class Package:
    """A Debian package with recordings of speech.

    clips: regular expression for the recordings' paths; its group `voice` tells voices apart, its group `language`, if
    there is one, languages.
    """

    name: str
    licence: str
    clips: str
    language: str = ""


_ASTERISK = r"sounds/(?P<voice>\w+)/(?!silence)(.*/)?[^/]+\.g722"
PACKAGES = [
    Package("asterisk-core-sounds-en-g722", "CC-BY-SA-3.0", _ASTERISK, "en"),
    Package("asterisk-core-sounds-es-g722", "CC-BY-SA-3.0", _ASTERISK, "es"),
    Package("asterisk-core-sounds-fr-g722", "CC-BY-SA-3.0", _ASTERISK, "fr"),
    Package("asterisk-core-sounds-it-g722", "CC-BY-3.0", _ASTERISK, "it"),
    Package("asterisk-core-sounds-ru-g722", "CC-BY-3.0", _ASTERISK, "ru"),
    Package("festvox-ru", "BSD-like", r"voices/russian/(?P<voice>\w+)/wav/[^/]+\.wav", "ru"),
    Package("fillets-ng-data-cs", "GPL-2", r"/cs/[^/]*?-(?P<voice>\w+)-[^/]+\.ogg", "cs"),
    Package("fillets-ng-data-nl", "GPL-2", r"/nl/[^/]*?-(?P<voice>\w+)-[^/]+\.ogg", "nl"),
    Package("gcin-voice", "LGPL-3 (voice 3), CC-BY-3.0 (voice 5)", r"ogg/[^/]+/(?P<voice>\d)\.ogg", "zh"),
    Package("klettres-data", "GPL-2+", r"klettres/(?P<language>\w+)/(?P<voice>alpha|syllab)/[^/]+\.ogg"),
    Package("ktuberling-data", "GPL-2+", r"sounds/(?P<language>[\w@]+)/(?P<voice>)[^/]+\.(ogg|opus|wav)"),
    Package("tuxpaint-stamps-default", "GPL-2", r"_desc_(?P<language>\w+)(?P<voice>)\.(ogg|wav)"),
]


@dataclass(frozen=True)
class Clip:
    """A recording in an unpacked package."""

    path: Path
    package: str
    licence: str
    language: str
    voice: str


@dataclass(frozen=True)
class Entry:
    """A written file, as the manifest lists it."""

    file: str
    seconds: float
    package: str
    licence: str
    language: str
    voice: str
    variant: int  # 0: as recorded
    clips: int


def fetch(package: Package, folder: Path) -> Path:
    """Download and unpack a Debian package, unless that is done; return the folder of its files.

    Raises InputError if the package cannot be had.
    """
    target = folder / package.name
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["apt-get", "download", package.name], cwd=folder, capture_output=True, text=True, check=False
    )
    archives = sorted(folder.glob(f"{package.name}_*.deb"))
    if done.returncode or not archives:
        reason = done.stderr.strip().splitlines()[-1:] or ["no archive"]
        raise InputError(f"the package {package.name} could not be downloaded: {reason[0]} (run apt-get update)")
    with new_folder(target) as part:
        subprocess.run(["dpkg-deb", "-x", archives[-1], part], check=True)
    archives[-1].unlink()
    return target


def clips_of(package: Package, folder: Path) -> list[Clip]:
    """The recordings in the folder of an unpacked package, sorted by language, voice and path.

    Raises InputError if there are none.
    """
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (match := re.search(package.clips + "$", path.relative_to(folder).as_posix())) is not None:
            language = match.groupdict().get("language", package.language)
            found.append(Clip(path, package.name, package.licence, language, match["voice"] or language))
    if not found:
        raise InputError(f"{folder} holds no recordings of {package.name}")
    return sorted(found, key=lambda clip: (clip.language, clip.voice))  # stable: paths stay in order


def read(path: Path) -> tuple[np.ndarray, int]:
    """A recording as mono float32 [N], and its sample rate; ffmpeg decodes what libsndfile does not."""
    source: Path | io.BytesIO = path
    if path.suffix == ".g722":
        command: list[str | Path] = ["ffmpeg", "-v", "error", "-i", path, "-f", "wav", "-"]
        source = io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
    audio, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return audio.mean(axis=1), rate


def is_wide_band(audio: np.ndarray, rate: int) -> bool:
    """Whether speech [N] has energy above 4 kHz: telephone recordings that were resampled have not."""
    size = round(FRAME * rate)
    if len(audio) < size or rate < 2 * WIDE_BAND[1]:
        return False
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[:: size // 2] * np.hanning(size)
    power, bins = np.abs(np.fft.rfft(frames)) ** 2, np.fft.rfftfreq(size, 1 / rate)

    def band(limits: tuple[int, int]) -> np.ndarray:
        return power[:, (bins >= limits[0]) & (bins < limits[1])].sum(axis=1)

    wide, speech = np.percentile(band(WIDE_BAND), 97), np.percentile(band(SPEECH_BAND), 95)
    return bool(wide > speech * 10 ** (WIDE_LEVEL / 10))


def without_silence(audio: np.ndarray, rate: int) -> np.ndarray:
    """Speech [N] without its silent frames, except `PAUSE` seconds beside every sound."""
    size = round(0.01 * rate)
    frames = audio[: len(audio) // size * size].reshape(-1, size)
    if not len(frames):
        return audio[:0]
    power = np.square(frames).mean(axis=1)
    sounding = power > max(np.percentile(power, 95) * 10 ** (SILENCE / 10), 1e-9)
    kept = binary_dilation(sounding, iterations=round(PAUSE / 0.01))
    return frames[kept].flatten() if sounding.sum() * 0.01 >= SHORTEST else audio[:0]


def prepare(clip: Clip) -> np.ndarray | None:
    """A clip at `RATE`, without silence and at a common level; None if it is narrow-band, silent or unreadable."""
    try:
        audio, rate = read(clip.path)
    except (soundfile.LibsndfileError, subprocess.CalledProcessError):
        return None
    if not is_wide_band(audio, rate):
        return None
    audio = without_silence(soxr.resample(audio - audio.mean(), rate, RATE), RATE)
    if not len(audio):
        return None
    level = np.sqrt(np.mean(audio**2))
    return audio * min(10 ** (-24 / 20) / level, 0.95 / np.abs(audio).max())


def join(clips: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Lists of clips that make files of at least `SECONDS`; what is left at the end makes a shorter one."""
    group: list[np.ndarray] = []
    for clip in clips:
        group.append(clip)
        if sum(map(len, group)) >= SECONDS * RATE:
            yield group
            group = []
    if group:
        yield group


def vary(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Augment speech [N]: pitch and formants shifted by resampling, then reverberation and background noise."""
    resampled = soxr.resample(audio, RATE, RATE * np.exp(rng.uniform(-0.16, 0.16)))
    return simulate_recording(rng, resampled.astype(np.float64), RATE).astype(np.float32)


def write_voice(clips: list[Clip], folder: Path, variants: int, seed: int) -> list[Entry]:
    """Write the files of one voice, each `variants` times; return their entries."""
    first, entries = clips[0], []
    name = f"{first.package}-{first.language}-{first.voice}"
    prepared = (audio for clip in clips if (audio := prepare(clip)) is not None)
    for number, group in enumerate(join(prepared)):
        for variant in range(variants):
            rng = np.random.default_rng([seed, number, variant, *name.encode()])
            audio = np.concatenate(group)
            audio = audio if variant == 0 else vary(audio, rng)
            file = f"{name}-{number:04d}-{variant}.flac"
            with replacing(folder / file) as part:
                soundfile.write(part, audio, RATE, "PCM_16", format="FLAC")
            labels = (first.package, first.licence, first.language, first.voice)
            entries.append(Entry(file, round(len(audio) / RATE, 2), *labels, variant, len(group)))
    return entries


def collect(folder: Path, packages: Path, variants: int = 3, seed: int = 0, workers: int = 1) -> list[Entry]:
    """Fetch all packages and write their speech, the manifest and a summary to `folder`; return the entries."""
    if not 1 <= variants <= 1000:
        raise InputError(f"variants must lie in [1, 1000], got {shown(variants)}")
    missing = [program for program in ("apt-get", "dpkg-deb", "ffmpeg") if shutil.which(program) is None]
    if missing:
        raise InputError(f"recordings need Debian's apt, dpkg and ffmpeg: {', '.join(missing)} is not installed")
    clips = [clip for package in PACKAGES for clip in clips_of(package, fetch(package, packages))]
    voices = [list(group) for _, group in groupby(clips, lambda clip: (clip.package, clip.language, clip.voice))]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    with ProcessPoolExecutor(workers) as pool:
        for written in pool.map(partial(write_voice, folder=folder, variants=variants, seed=seed), voices):
            entries += written
            if written:
                typer.echo(f"{written[0].package} {written[0].language} {written[0].voice}: {len(written)} files")
    with replacing(folder / "manifest.jsonl") as part:
        part.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries), encoding="utf-8")
    with replacing(folder / "README.md") as part:
        part.write_text(summarize(entries), encoding="utf-8")
    return entries


def summarize(entries: list[Entry]) -> str:
    """A Markdown table of the hours as recorded, by package, with languages, voices and licence."""
    recorded = [entry for entry in entries if entry.variant == 0]
    rows = ["| package | licence | languages | voices | clips | hours |", "|---|---|---|---|---|---|"]
    for name, group in groupby(recorded, lambda entry: entry.package):
        part = list(group)
        languages = ", ".join(sorted({entry.language for entry in part}))
        voices = len({(entry.language, entry.voice) for entry in part})
        clips, hours = sum(entry.clips for entry in part), sum(entry.seconds for entry in part) / 3600
        rows.append(f"| {name} | {part[0].licence} | {languages} | {voices} | {clips} | {hours:.2f} |")
    hours, varied = (sum(entry.seconds for entry in some) / 3600 for some in (recorded, entries))
    rows.append(f"| all | | | | {sum(entry.clips for entry in recorded)} | {hours:.2f} |")
    return (
        "\n".join(rows) + f"\n\n{varied:.2f} hours with the variants. Voices are told apart by folder and file name.\n"
    )


def _main(
    folder: Annotated[Path, typer.Argument(help="Output folder for the FLAC files.")],
    packages: Annotated[Path, typer.Option(help="Folder for the unpacked packages.")] = Path("out/debian"),
    variants: Annotated[int, typer.Option(help="Copies of each file, of which all but one are augmented.")] = 3,
    seed: Annotated[int, typer.Option(help="Random seed of the variants.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    typer.echo(summarize(collect(folder, packages, variants, seed, workers)))


if __name__ == "__main__":
    typer.run(_main)
