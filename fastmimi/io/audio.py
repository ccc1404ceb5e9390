"""Audio files in and out, block by block: what libsndfile reads, downmixed and resampled to the codec's rate.

Blocks are float32 [samples, channels]. Memory does not grow with the length of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ..errors import InputError
from .files import check_input, path_of

Block = np.ndarray

BLOCK_SECONDS = 2
BLOCK_VALUES = 1 << 21  # a bound for files of many channels or of a rate that is nonsense
ALIASES = {"AIF": "AIFF", "AIFC": "AIFF", "OGA": "OGG", "OPUS": "OGG", "SND": "AU", "WAVE": "WAV"}
NOT_WRITTEN = {"RAW", "HTK", "SD2", "SDS", "WVE", "XI"}  # headerless, of rates of their own, or written wrongly
SUFFIXES = {f".{name.lower()}" for name in (soundfile.available_formats().keys() | ALIASES.keys()) - NOT_WRITTEN}
FLOATING = {"FLOAT", "DOUBLE", "VORBIS", "OPUS"}  # subtypes that hold samples beyond [-1, 1]

UNKNOWN = 2**63 - 1  # libsndfile's number of frames where the header has none
STREAMED = 0x7FFF0000  # a chunk size from here on is what writers to a pipe put: "until the end"
SLOPPY = 64  # bytes by which a chunk size may be wrong before the file counts as cut


@dataclass(frozen=True)
class AudioFile:
    """What an audio file holds. frames: samples per channel."""

    path: Path
    format: str  # "WAV", "FLAC", ...
    subtype: str  # "PCM_16", "VORBIS", ...
    sample_rate: int  # Hz
    channels: int
    frames: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.sample_rate

    def length_at(self, rate: int) -> int:
        """Samples per channel after resampling to `rate` Hz."""
        return resampled_length(self.frames, self.sample_rate, rate)


def resampled_length(frames: int, rate: int, to_rate: int) -> int:
    """frames * to_rate / rate rounded half up, in exact arithmetic: what `read_blocks` yields in all."""
    return (2 * frames * to_rate + rate) // (2 * rate)


def files_below(folder: Path) -> list[Path]:
    """Audio files of a folder and those below it, by their suffixes, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def probe(path: str | Path) -> AudioFile:
    """Read a file's header. Raises InputError where it is missing, not audio, cut, or without samples."""
    path = check_input(path_of(path, "an audio file"))
    with _open(path) as file:
        if _is_cut(path, file.format, file.extra_info):
            raise InputError(f"{path} is truncated: its header promises more audio than the file holds")
        frames = file.frames if _frames_are_known(path, file) else _count(file, path)
        found = AudioFile(path, file.format, file.subtype, file.samplerate, file.channels, frames)
    if found.frames == 0:
        raise InputError(f"{path} holds no samples")
    return found


def read_blocks(file: AudioFile, rate: int, channels: int = 1) -> Iterator[Block]:
    """Blocks of the whole file at `rate` Hz; with several channels in the file and one asked for, their mean.

    Resampling does not depend on how the file is cut into blocks. Raises InputError where samples are NaN or
    infinite, the file ends before its header says, or its channels do not fit.
    """
    if channels not in (1, file.channels):
        raise InputError(f"{file.path} has {file.channels} channels, and the model takes {channels}")
    resampler = None
    if file.sample_rate != rate:
        resampler = soxr.ResampleStream(file.sample_rate, rate, channels, dtype="float32")
    frames = given = 0
    for block in _raw_blocks(file):
        frames += len(block)
        if channels < file.channels:
            block = block.mean(axis=1, keepdims=True)
        if resampler is not None:
            block = resampler.resample_chunk(block)
        if len(block):
            given += len(block)
            yield block
    length = resampled_length(frames, file.sample_rate, rate)
    if length == 0:
        raise InputError(f"{file.path} is too short: {frames / file.sample_rate} s are not one sample at {rate} Hz")
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)
        rest = rest[: length - given]
        yield np.pad(rest, ((0, length - given - len(rest)), (0, 0)))  # soxr may round the length otherwise


def _raw_blocks(file: AudioFile) -> Iterator[Block]:
    """Float32 [samples, channels] as they stand in the file, checked to be finite and complete."""
    done = 0
    with _open(file.path) as source:
        while len(block := _read(source, file.path)):
            _check_finite(block, done, file)
            done += len(block)
            yield block
    if done < file.frames:
        raise InputError(f"{file.path} is truncated: {file.frames} samples were promised and {done} are there")


def _check_finite(block: Block, start: int, file: AudioFile) -> None:
    if not np.isfinite(block).all():
        sample, channel = np.argwhere(~np.isfinite(block))[0]
        where = start + int(sample)
        raise InputError(
            f"audio must be finite: {file.path} holds {block[sample, channel]} at sample {where} "
            f"({where / file.sample_rate:.3f} s)"
        )


class Forward(soundfile.SoundFile):
    """A file that is read or written from start to end.

    Around every call on a seekable file soundfile asks for the position and seeks to it, which upsets some of
    libsndfile's decoders (MP3 starts anew at each block) and fails for a FLAC that was written to a pipe.
    """

    def seekable(self) -> bool:
        return False


# What libsndfile does and does not tell about broken files


def _open(path: Path) -> Forward:
    if path.suffix.lower() == ".raw":  # soundfile would want its rate, channels and sample type
        raise InputError(f"{path} is headerless: convert it to a format that says its rate, such as wav")
    try:
        return Forward(path)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise InputError(f"{path} is not an audio file that libsndfile can read, or is truncated ({reason})") from None


def _read(source: Forward, path: Path) -> Block:
    """The next block, [0, channels] at the end."""
    size = max(1, min(BLOCK_SECONDS * source.samplerate, BLOCK_VALUES // source.channels))
    try:
        return source.read(size, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise InputError(f"{path} is damaged or truncated ({reason})") from None


def _is_cut(path: Path, kind: str, header_log: str) -> bool:
    """Whether the file is shorter than its header says, where libsndfile makes nothing of it."""
    if kind == "OGG":
        return not _ogg_ends(path)
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", header_log)  # WAV, AIFF, AU, W64, RF64
    return any(int(there) + SLOPPY < int(said) < STREAMED for said, there in sizes)


def _ogg_ends(path: Path) -> bool:
    """Whether the last Ogg page is complete and carries the end-of-stream flag (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a page has less than 64 KiB
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    segments = page[26]
    return bool(page[5] & 4) and len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _frames_are_known(path: Path, file: Forward) -> bool:
    """Whether the header says how long the file is: a FLAC that was written to a pipe does not, nor do most MP3s.

    MP3 frames carry no count; a Xing, Info or VBRI header in the first of them does.
    """
    if file.format != "MP3":
        return file.frames < UNKNOWN
    with open(path, "rb") as stream:
        head = stream.read(1 << 20)  # beyond an ID3 tag with a picture
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _count(file: Forward, path: Path) -> int:
    """Samples per channel of a file at its beginning, by reading it."""
    frames = 0
    while taken := len(_read(file, path)):
        frames += taken
    return frames


# Out


def output_format(path: str | Path) -> tuple[str, str]:
    """libsndfile's format and subtype for a target's suffix; InputError for one it does not write."""
    path = path_of(path, "an audio file")
    suffix = path.suffix[1:].upper()
    name = ALIASES.get(suffix, suffix)
    known = soundfile.available_formats().keys() - NOT_WRITTEN
    if name not in known:
        listed = ", ".join(sorted(known | ALIASES.keys())).lower()
        raise InputError(f"cannot write {path}: its suffix must be one of {listed}, got {path.suffix!r}")
    return name, "OPUS" if suffix == "OPUS" else soundfile.default_subtype(name)


class AudioWriter:
    """Writes blocks to a file, as a context manager. Raises InputError where libsndfile cannot write them.

    clipped: samples outside [-1, 1] so far, set to the bound where the format holds integers.
    """

    def __init__(self, path: str | Path, kind: tuple[str, str], sample_rate: int, channels: int = 1):
        """`kind` is the format and the subtype, see `output_format`; the suffix of `path` does not count."""
        self.clipped = 0
        self._holds_more = kind[1] in FLOATING
        try:
            self._file = Forward(path, "w", sample_rate, channels, format=kind[0], subtype=kind[1])
        except soundfile.LibsndfileError as error:
            raise InputError(f"cannot write {kind[0]} audio at {sample_rate} Hz: {error.error_string}") from None

    def write(self, block: Block) -> None:
        """Append float32 [samples, channels]."""
        if not self._holds_more:
            self.clipped += int((np.abs(block) > 1).sum())
            block = block.clip(-1, 1)
        with _write_errors():
            self._file.write(block)

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with _write_errors() if error[0] is None else suppress(soundfile.LibsndfileError):
            self._file.close()


@contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise InputError(f"audio could not be written ({reason}): is the disk full?") from None
