"""How many streams fit in memory, and how many a machine sustains: the latter is measured, not computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError, shown
from ..models.codec import Codec
from .slots import DIRECTIONS, SlotPool

TICKS = 24  # timed for each number of streams
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def state_bytes_per_stream(codec: Codec, directions: Sequence[str] = DIRECTIONS) -> int:
    """Memory of one stream's state in a pool, in bytes."""
    return SlotPool(codec, 1, directions=directions).bytes_per_slot


def streams_in(codec: Codec, nbytes: float, directions: Sequence[str] = DIRECTIONS) -> int:
    """How many streams' states fit in so much memory, beside the weights."""
    if not nbytes > 0:
        raise InputError(f"nbytes must be positive, got {shown(nbytes)}")
    return int(nbytes // state_bytes_per_stream(codec, directions))


@dataclass(frozen=True)
class Sustained:
    """Times of ticks in which so many streams have one frame each.

    seconds: the median tick. share: of the machine's time that these streams take, `seconds` / 80 ms.
    """

    streams: int
    seconds: float
    share: float


def measure(
    codec: Codec, *, directions: Sequence[str] = DIRECTIONS, num_codebooks: int | None = None,
    most: int = SIZES[-1], progress: Callable[[Sustained], None] | None = None,
) -> list[Sustained]:  # fmt: skip
    """Time ticks of more and more streams until they take longer than a frame lasts; the last one is over it.

    Nothing else should run meanwhile. A server should be given about 80% of what is sustained: ticks wait for one
    another.
    """
    frame_s, found = 1 / codec.frame_rate, list[Sustained]()
    count = codec.num_codebooks if num_codebooks is None else num_codebooks
    for streams in [size for size in SIZES if size <= most]:
        pool = SlotPool(codec, streams, directions=directions, num_codebooks=count)
        pool.warm_up()
        audio = torch.zeros(streams, codec.config.audio_channels, codec.frame_size).normal_(std=0.1)
        codes = torch.randint(0, codec.config.codebook_size, (streams, count, 1))
        times = []
        for _ in range(TICKS):
            start = time.perf_counter()
            if "encode" in directions:
                pool.step_encode(audio, range(streams)).cpu()
            if "decode" in directions:
                pool.step_decode(codes, range(streams)).cpu()
            times.append(time.perf_counter() - start)
        seconds = sorted(times)[TICKS // 2]
        found.append(Sustained(streams, seconds, seconds / frame_s))
        if progress is not None:
            progress(found[-1])
        if seconds > frame_s:
            break
    return found
