"""Encode blocks of audio to codes and decode codes to blocks of audio, through a stream.

A block is what is read from or written to a file, a chunk is what is handed to the model in one call. Memory use does
not grow with the length of the audio, except for configurations that cannot stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, ParamSpec

import numpy as np
import torch

if TYPE_CHECKING:
    from ..models.codec import Codec

P = ParamSpec("P")
STEP_FRAMES = 50  # frames of codes per chunk: 4 s


@dataclass
class Clock:
    """Time spent in the model, in seconds: in total and in the slowest step, with the number of steps."""

    seconds: float = 0.0
    slowest: float = 0.0
    steps: int = 0

    def time(self, step: Callable[P, torch.Tensor], *args: P.args, **options: P.kwargs) -> np.ndarray:
        """Run a step and return the first row of its result as a 32-bit numpy array.

        The time includes the copy to the CPU, which waits until a GPU has finished.
        """
        start = perf_counter()
        with torch.inference_mode():
            row = step(*args, **options)[0]
            result = (row.float() if row.is_floating_point() else row.int()).cpu().numpy()
        taken = perf_counter() - start
        self.seconds += taken
        self.slowest = max(self.slowest, taken)
        self.steps += 1
        return result


def encode(codec: Codec, blocks: Iterable[np.ndarray], clock: Clock, *, frame_by_frame: bool = False) -> np.ndarray:
    """Blocks [n, channels] float32 at the codec's rate -> codes [K, T] int32, which do not depend on the block lengths.

    With `frame_by_frame` the model gets chunks of one frame (80 ms), as from a live stream, instead of 50 frames. A
    configuration that cannot stream is encoded in one call; with `frame_by_frame` it raises InputError.
    """
    if not (codec.config.streamable or frame_by_frame):
        return clock.time(codec.encode, _tensor(np.concatenate([*blocks])))
    state = codec.new_state()
    if frame_by_frame:
        codec.warm_up(state)
    size = codec.frame_size * (1 if frame_by_frame else STEP_FRAMES)
    codes = [clock.time(codec.encode, _tensor(chunk), state=state) for chunk in rechunk(blocks, size)]
    if state.pending_length.any():
        codes.append(clock.time(codec.flush, state))
    return np.concatenate(codes, axis=1)


def decode(
    codec: Codec, codes: np.ndarray, length: int, clock: Clock, *, frame_by_frame: bool = False
) -> Iterator[np.ndarray]:
    """Codes [K, T] -> blocks [n, channels] float32 of `length` samples in total.

    `frame_by_frame` decodes one frame per call instead of 50. A configuration that cannot stream is decoded in one
    call; with `frame_by_frame` it raises InputError.
    """
    if not (codec.config.streamable or frame_by_frame):
        state, size = None, codes.shape[1]
    else:
        state, size = codec.new_state(), 1 if frame_by_frame else STEP_FRAMES
        if frame_by_frame:
            codec.warm_up(state, num_codebooks=len(codes))
    for start in range(0, codes.shape[1], size):
        chunk = torch.from_numpy(codes[None, :, start : start + size].astype(np.int64))
        audio = clock.time(codec.decode, chunk, state=state)
        yield audio.T[: length - start * codec.frame_size]


def rechunk(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroup blocks [n, channels] into chunks of `size` samples, the last of which may be shorter."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= size:
            joined = np.concatenate(held)
            whole = count - count % size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)


def _tensor(block: np.ndarray) -> torch.Tensor:
    """[n, channels] -> [1, channels, n]."""
    return torch.from_numpy(np.ascontiguousarray(block.T))[None]
