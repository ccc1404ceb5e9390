"""What `encode`, `decode`, `roundtrip`, `info` and `explain` do: check, load, encode, decode, draw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints import weights
from ..errors import InputError
from ..io import plot, transcode
from ..io.audio import AudioFile, AudioWriter, read_blocks
from ..io.files import check_output
from ..io.tokens import Tokens
from ..models import checks
from ..models.codec import Codec
from ..models.registry import ARCHITECTURES
from ..runtime import dispatch
from . import report

if TYPE_CHECKING:
    from ..devtools.costs import Stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Encoded:
    """The result of `encode`."""

    tokens: Tokens
    track: plot.Track  # the beginning of the audio that was encoded
    clock: transcode.Clock


@dataclass
class Decoded:
    """The result of `decode`."""

    track: plot.Track  # the beginning of the decoded audio
    clock: transcode.Clock


# Checks


def check_paths(inputs: list[Path], outputs: Iterable[Path | None]) -> None:
    """Raise InputError unless every output can be written and none is an input or another output."""
    taken = list(inputs)
    for path in outputs:
        if path is not None:
            check_output(path, taken)
            taken.append(path)


def picture(path: Path | None) -> str:
    """The format of the picture, or '' if none is requested."""
    return "" if path is None else plot.check(path)


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    return DTYPES[name]


def device_type(name: str) -> str:
    """'cuda' for 'cuda:1'; the device need not exist."""
    return checks.device_type(name).type


def is_model_name(source: Path) -> bool:
    """Whether `load` takes this for the name of a model and not for a file: demo, random weights, or a hub id."""
    name = source.as_posix()
    if source.exists():
        return False
    ours = name == "demo" or weights.RANDOM.fullmatch(name) is not None
    return ours or (not source.suffix and name.count("/") == 1)


# Actions


def load(
    model: str, device: str, dtype: str, impl: str, codebooks: int | None = None, weights_as: str | None = None
) -> Codec:
    """Load the codec; arguments are checked before weights are downloaded."""
    where, kind = checks.device(device), dtype_of(dtype)
    dispatch.explain(where.type, kind, impl)  # raises InputError if the implementation cannot run
    with report.busy(f"loading {model}"):
        return weights.load(
            model, device=where, dtype=kind, impl=impl, num_codebooks=codebooks, weights=weights_as
        )  # fmt: skip


def costs(device: str) -> tuple[dict[str, list[Stage]], dict[str, float], str]:
    """The stages of each architecture, the measured peak rates of the device, and its name."""
    from ..devtools import costs

    where = checks.device(device)
    with report.busy("counting, and measuring this machine"):
        found = {name: costs.stages(entry.config()) for name, entry in ARCHITECTURES.items()}
        return found, costs.ceilings(str(where)), device


def encode(codec: Codec, file: AudioFile, model: str, *, packed: bool, stream: bool) -> Encoded:
    channels = codec.config.audio_channels
    if channels == 1 < file.channels:
        report.note(f"{file.path} has {file.channels} channels; their mean is encoded")
    track, clock = plot.Track(round(plot.SECONDS * codec.sample_rate)), transcode.Clock()
    blocks = read_blocks(file, codec.sample_rate, channels)
    with report.progress("encoding", file.length_at(codec.sample_rate)) as watch:
        codes = transcode.encode(codec, track.tee(watch(blocks)), clock, frame_by_frame=stream)
    tokens = Tokens(
        codes, codebook_size=codec.config.codebook_size, sample_rate=codec.sample_rate, frame_rate=codec.frame_rate,
        frame_size=codec.frame_size, length=track.total, fingerprint=weights.fingerprint(codec), model=model,
        packed=packed,
    )  # fmt: skip
    return Encoded(tokens, track, clock)


def decode(codec: Codec, tokens: Tokens, target: Path, kind: tuple[str, str], *, stream: bool) -> Decoded:
    track, clock = plot.Track(round(plot.SECONDS * codec.sample_rate)), transcode.Clock()
    blocks = transcode.decode(codec, tokens.codes, tokens.length, clock, frame_by_frame=stream)
    with (
        AudioWriter(target, kind, codec.sample_rate, codec.config.audio_channels) as writer,
        report.progress("decoding", tokens.length) as watch,
    ):
        for block in track.tee(watch(blocks)):
            writer.write(block)
    if writer.clipped:
        report.note(f"{writer.clipped} samples outside [-1, 1] were clipped")
    return Decoded(track, clock)


def draw(target: Path, kind: str, tokens: Tokens, tracks: dict[str, plot.Track], source: Path) -> None:
    with report.busy("drawing"):
        plot.draw(
            target, kind, tokens.codes, {name: track.audio for name, track in tracks.items()},
            sample_rate=tokens.sample_rate, frame_size=tokens.frame_size, codebook_size=tokens.codebook_size,
            title=f"{source.name}, {tokens.num_codebooks} codebooks of {tokens.model}",
        )  # fmt: skip
