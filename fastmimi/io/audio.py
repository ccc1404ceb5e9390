"""Read and write audio files block by block; reading downmixes and resamples to the codec's sample rate.

Every format that libsndfile reads is accepted. Blocks are float32 [samples, channels]. Memory use does not grow with
the length of the file.
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
BLOCK_VALUES = 1 << 21  # upper bound on samples * channels, for files with many channels or an absurd sample rate
ALIASES = {"AIF": "AIFF", "AIFC": "AIFF", "OGA": "OGG", "OPUS": "OGG", "SND": "AU", "WAVE": "WAV"}
NOT_WRITTEN = {"RAW", "HTK", "SD2", "SDS", "WVE", "XI"}  # headerless, limited to certain rates, or written incorrectly
SUFFIXES = {f".{name.lower()}" for name in (soundfile.available_formats().keys() | ALIASES.keys()) - NOT_WRITTEN}
UNCLIPPED_SUBTYPES = {"FLOAT", "DOUBLE", "VORBIS", "OPUS"}  # can represent samples outside [-1, 1]

SEEKABLE_SUBTYPES = {"FLOAT", "DOUBLE", "ULAW", "ALAW"}  # beside PCM: each sample is decoded on its own

UNKNOWN_FRAMES = 2**63 - 1  # the number of frames that libsndfile reports if the header has none
UNTIL_END = 0x7FFF0000  # chunk sizes from here on mean "until the end of the file": the writer could not seek back
SIZE_TOLERANCE = 64  # bytes that a chunk may be short before the file counts as truncated


@dataclass(frozen=True)
class AudioFile:
    """The properties of an audio file, as `probe` reads them from its header."""

    path: Path
    format: str  # "WAV", "FLAC", ...
    subtype: str  # "PCM_16", "VORBIS", ...
    sample_rate: int  # Hz
    channels: int
    frames: int  # samples per channel

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.sample_rate

    def length_at(self, rate: int) -> int:
        """Number of samples per channel after resampling to `rate` Hz."""
        return resampled_length(self.frames, self.sample_rate, rate)


def resampled_length(frames: int, rate: int, to_rate: int) -> int:
    """frames * to_rate / rate, rounded half up in integer arithmetic: the total length that `read_blocks` yields."""
    return (2 * frames * to_rate + rate) // (2 * rate)


def files_below(folder: Path) -> list[Path]:
    """The audio files in a folder, found recursively by their suffixes, in sorted order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def probe(path: str | Path) -> AudioFile:
    """Read a file's header. Raises InputError if the file is missing, not audio, truncated, or has no samples."""
    path = check_input(path_of(path, "an audio file"))
    with _open(path) as file:
        if _is_truncated(path, file.format, file.extra_info):
            raise InputError(f"{path} is truncated: its header declares more audio than the file holds")
        frames = file.frames if _header_has_length(path, file) else _count_frames(file, path)
        found = AudioFile(path, file.format, file.subtype, file.samplerate, file.channels, frames)
    if found.frames == 0:
        raise InputError(f"{path} holds no samples")
    return found


def read_blocks(
    file: AudioFile, rate: int, channels: int = 1, *, start: int = 0, stop: int | None = None,
    channel: int | None = None,
) -> Iterator[Block]:  # fmt: skip
    """Yield a file as float32 blocks [samples, channels], resampled to `rate` Hz.

    With `channels` 1, a file with several channels is downmixed to their mean, or only `channel`, counted from 0, is
    taken. `start` and `stop` limit what is read to these samples of the file, which are resampled as if they were all
    of it. Where the blocks begin and end does not affect resampling. Raises InputError if a sample is NaN or infinite,
    if the file ends before the length in its header or before `stop`, if there is nothing between `start` and `stop`,
    if there is no such `channel`, or if `channels` is neither 1 nor the number of channels in the file.
    """
    if channels not in (1, file.channels):
        raise InputError(f"{file.path} has {file.channels} channels, and the model takes {channels}")
    if channel is not None and (channels != 1 or not 0 <= channel < file.channels):
        raise InputError(f"{file.path} has {file.channels} channels, and channel {channel} (from 0) was asked for")
    stop = file.frames if stop is None else stop
    if not 0 <= start < stop <= file.frames:
        at = f"{start / file.sample_rate:g} s to {stop / file.sample_rate:g} s"
        raise InputError(f"{file.path} has {file.duration:g} s, and {at} was asked for")
    resampler = None
    if file.sample_rate != rate:
        resampler = soxr.ResampleStream(file.sample_rate, rate, channels, dtype="float32")
    frames = yielded = 0
    for block in _file_blocks(file, start, stop):
        frames += len(block)
        if channel is not None:
            block = block[:, channel : channel + 1]
        elif channels < file.channels:
            block = block.mean(axis=1, keepdims=True)
        if resampler is not None:
            block = resampler.resample_chunk(block)
        if len(block):
            yielded += len(block)
            yield block
    length = resampled_length(frames, file.sample_rate, rate)
    if length == 0:
        raise InputError(f"{file.path} is too short: {frames / file.sample_rate} s is less than a sample at {rate} Hz")
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)
        rest = rest[: length - yielded]
        yield np.pad(rest, ((0, length - yielded - len(rest)), (0, 0)))  # soxr may round the length differently


def _file_blocks(file: AudioFile, start: int, stop: int) -> Iterator[Block]:
    """Blocks [samples, channels] float32 of a file from `start` to `stop`, checked to be finite and complete.

    To the end of the file it is read further than its header says, if it holds more.
    """
    with _open(file.path) as source:
        done = _skip(source, file, start)
        while (done < stop or stop == file.frames) and len(block := _read(source, file.path)):
            if stop < file.frames:
                block = block[: stop - done]
            _check_finite(block, done, file)
            done += len(block)
            yield block
    if done < stop:
        raise InputError(f"{file.path} is truncated: its header declares {file.frames} samples and it holds {done}")


def _skip(source: Forward, file: AudioFile, start: int) -> int:
    """Go to sample `start` of a file that was just opened, reading where seeking would not be exact."""
    if file.subtype.startswith("PCM_") or file.subtype in SEEKABLE_SUBTYPES:
        with suppress(soundfile.LibsndfileError):  # a FLAC that was written to a pipe
            return source.seek(start)
    done = 0
    while done < start and (count := len(_read(source, file.path, start - done))):
        done += count
    return done


def _check_finite(block: Block, start: int, file: AudioFile) -> None:
    if not np.isfinite(block).all():
        sample, channel = np.argwhere(~np.isfinite(block))[0]
        where = start + int(sample)
        raise InputError(
            f"audio must be finite: {file.path} holds {block[sample, channel]} at sample {where} "
            f"({where / file.sample_rate:.3f} s)"
        )


class Forward(soundfile.SoundFile):
    """A file that is read or written sequentially, without seeking.

    On a seekable file, soundfile queries the position and seeks to it around every call. That restarts libsndfile's
    MP3 decoder at each block, and fails for a FLAC that was written to a pipe.
    """

    def seekable(self) -> bool:
        return False


# Opening files, and detecting damage that libsndfile does not report


def _open(path: Path) -> Forward:
    if path.suffix.lower() == ".raw":  # soundfile would need its rate, channels and sample type
        raise InputError(f"{path} is headerless: convert it to a format that stores its sample rate, such as wav")
    try:
        return Forward(path)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise InputError(f"{path} is not an audio file that libsndfile can read, or is truncated ({reason})") from None


def _read(source: Forward, path: Path, most: int = BLOCK_VALUES) -> Block:
    """The next block, of at most `most` samples; [0, channels] at the end."""
    size = max(1, min(BLOCK_SECONDS * source.samplerate, BLOCK_VALUES // source.channels, most))
    try:
        return source.read(size, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise InputError(f"{path} is damaged or truncated ({reason})") from None


def _is_truncated(path: Path, kind: str, header_log: str) -> bool:
    """Whether the file is shorter than its header declares, for formats in which libsndfile does not report that."""
    if kind == "OGG":
        return not _ogg_is_complete(path)
    sizes = re.findall(r": (\d+) \(should be (\d+)\)", header_log)  # WAV, AIFF, AU, W64, RF64
    return any(int(actual) + SIZE_TOLERANCE < int(declared) < UNTIL_END for declared, actual in sizes)


def _ogg_is_complete(path: Path) -> bool:
    """Whether the last Ogg page is complete and has the end-of-stream flag (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a page is shorter than 64 KiB
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    segments = page[26]
    return bool(page[5] & 4) and len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _header_has_length(path: Path, file: Forward) -> bool:
    """Whether the header gives the length of the audio; that of a FLAC written to a pipe, for one, does not.

    An MP3 gives it only if its first frame holds a Xing, Info or VBRI header.
    """
    if file.format != "MP3":
        return file.frames < UNKNOWN_FRAMES
    with open(path, "rb") as stream:
        head = stream.read(1 << 20)  # enough to skip an ID3 tag with a picture
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _count_frames(file: Forward, path: Path) -> int:
    """The number of samples per channel of a file that was just opened, found by reading all of it."""
    frames = 0
    while count := len(_read(file, path)):
        frames += count
    return frames


# Writing


def output_format(path: str | Path) -> tuple[str, str]:
    """libsndfile's format and subtype for the suffix of `path`. Raises InputError for a suffix it cannot write."""
    path = path_of(path, "an audio file")
    suffix = path.suffix[1:].upper()
    name = ALIASES.get(suffix, suffix)
    known = soundfile.available_formats().keys() - NOT_WRITTEN
    if name not in known:
        listed = ", ".join(sorted(known | ALIASES.keys())).lower()
        raise InputError(f"cannot write {path}: its suffix must be one of {listed}, got {path.suffix!r}")
    return name, "OPUS" if suffix == "OPUS" else soundfile.default_subtype(name)


class AudioWriter:
    """Context manager that writes blocks to an audio file. Raises InputError if libsndfile cannot write them.

    `clipped` counts the samples clipped to [-1, 1] so far; formats that can represent larger samples do not clip.
    """

    def __init__(self, path: str | Path, kind: tuple[str, str], sample_rate: int, channels: int = 1):
        """`kind` is libsndfile's (format, subtype), see `output_format`; the suffix of `path` is ignored."""
        self.clipped = 0
        self._clips = kind[1] not in UNCLIPPED_SUBTYPES
        try:
            self._file = Forward(path, "w", sample_rate, channels, format=kind[0], subtype=kind[1])
        except soundfile.LibsndfileError as error:
            raise InputError(f"cannot write {kind[0]} audio at {sample_rate} Hz: {error.error_string}") from None

    def write(self, block: Block) -> None:
        """Append a block, float32 [samples, channels]."""
        if self._clips:
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
