"""Read what a row names: float32 samples at the codec's rate, or InputError with one sentence.

This module does not import PyTorch: reader processes start with it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import soundfile

from ..errors import InputError, one_line
from ..io.audio import AudioFile, Block, probe, read_blocks
from . import embedded
from .rows import Row

OVERSHOOT = 0.01  # seconds that a row may end after its file: other tools round durations up
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def blocks(row: Row, rate: int, channels: int = 1) -> Iterator[Block]:
    """Yield the row's audio as float32 blocks [samples, channels] at `rate` Hz.

    Raises InputError for what is wrong with the file, and OSError for what is wrong with the machine: a full disk.
    """
    path = Path(row.uri)
    try:
        with local_file(row.uri) as path:
            file = probe(path)
            start, stop = section(row, file)
            yield from read_blocks(file, rate, channels, start=start, stop=stop, channel=row.channel)
    except InputError as error:
        raise InputError(str(error).replace(str(path), row.uri)) from None  # not the name of a temporary copy
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise InputError(f"{row.uri} cannot be read ({one_line(error)})") from None


def samples(row: Row, rate: int, channels: int = 1) -> Block:
    """All of a row's audio, float32 [samples, channels] at `rate` Hz; errors as of `blocks`."""
    return np.concatenate([*blocks(row, rate, channels)])


def section(row: Row, file: AudioFile) -> tuple[int, int]:
    """The samples of the file, from and to, that a row is."""
    start = 0 if row.start is None else round(row.start * file.sample_rate)
    stop = file.frames if row.end is None else round(row.end * file.sample_rate)
    overshoot = stop - file.frames
    return start, file.frames if 0 < overshoot <= OVERSHOOT * file.sample_rate else stop


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file at a URI; what is not a file of this machine is copied to a temporary one first."""
    if not is_remote(uri):
        yield Path(uri.removeprefix("file://"))
        return
    with NamedTemporaryFile(prefix="fastmimi-") as copy:
        try:
            embedded.copy(uri, copy)
            copy.flush()
        except (InputError, OSError):
            raise
        except Exception as error:  # of whatever library fsspec found for the scheme
            raise InputError(f"{uri} cannot be fetched ({type(error).__name__}: {one_line(error)})") from None
        yield Path(copy.name)


def is_remote(uri: str) -> bool:
    """Whether a URI is no path of this machine."""
    return "://" in uri and not uri.startswith("file://")


def duration_of(row: Row) -> tuple[float, int] | None:
    """Seconds and sample rate of a row, from its file's header; None if that cannot be read.

    The file of a remote URI is not fetched for it, only its header, and rows of tables are not read.
    """
    if row.uri.startswith(embedded.TABLES):
        return None
    try:
        if not is_remote(row.uri):
            file = probe(row.uri.removeprefix("file://"))
        else:
            with embedded.opened(row.uri) as stream, soundfile.SoundFile(stream) as remote:
                file = AudioFile(Path(row.uri), "", "", remote.samplerate, remote.channels, remote.frames)
    except Exception:  # the row is kept, and reading it says what is wrong
        return None
    start, stop = section(row, file)
    return max(0, stop - start) / file.sample_rate, file.sample_rate
