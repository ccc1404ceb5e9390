"""Audio blocks to codes and codes to audio blocks, through a stream: memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ..models.codec import Codec

STEP_FRAMES = 50  # of codes that pass the model at once: 4 s, one of its own tiles


@dataclass
class Clock:
    """Seconds that the model took: in all, for the slowest step, and how many steps there were."""

    seconds: float = 0.0
    slowest: float = 0.0
    steps: int = 0

    def time(self, step: Callable[..., torch.Tensor], *args: Any, **options: Any) -> np.ndarray:
        """Run a step; its first row as numpy, in 32 bits. To fetch it is to wait until a GPU has finished."""
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
    """Blocks [n, channels] float32 at the codec's rate -> codes [K, T] int32; the same however they are cut.

    `frame_by_frame` feeds one frame (80 ms) at a time, as a live stream would, instead of 50. A configuration
    that cannot stream is encoded in one piece, or is an error with `frame_by_frame`.
    """
    if not (codec.config.streamable or frame_by_frame):
        return clock.time(codec.encode, _tensor(np.concatenate([*blocks])))
    state = codec.new_state()
    if frame_by_frame:
        codec.warm_up(state)
    size = codec.frame_size * (1 if frame_by_frame else STEP_FRAMES)
    parts = [clock.time(codec.encode, _tensor(block), state=state) for block in rechunk(blocks, size)]
    if state.pending_length.any():
        parts.append(clock.time(codec.flush, state))
    return np.concatenate(parts, axis=1)


def decode(
    codec: Codec, codes: np.ndarray, length: int, clock: Clock, *, frame_by_frame: bool = False
) -> Iterator[np.ndarray]:
    """Codes [K, T] -> blocks [n, channels] float32, in all `length` samples; see `encode` for the rest."""
    if not (codec.config.streamable or frame_by_frame):
        state, size = None, codes.shape[1]
    else:
        state, size = codec.new_state(), 1 if frame_by_frame else STEP_FRAMES
        if frame_by_frame:
            codec.warm_up(state, num_codebooks=len(codes))
    for start in range(0, codes.shape[1], size):
        part = torch.from_numpy(codes[None, :, start : start + size].astype(np.int64))
        audio = clock.time(codec.decode, part, state=state)
        yield audio.T[: length - start * codec.frame_size]


def rechunk(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples [n, channels] in blocks of `size`, the last one shorter."""
    held: list[np.ndarray] = []
    have = 0
    for block in blocks:
        held.append(block)
        have += len(block)
        if have >= size:
            joined = np.concatenate(held)
            whole = have - have % size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, have = [joined[whole:]], have - whole
    if have:
        yield np.concatenate(held)


def _tensor(block: np.ndarray) -> torch.Tensor:
    """[n, channels] -> [1, channels, n]."""
    return torch.from_numpy(np.ascontiguousarray(block.T))[None]
