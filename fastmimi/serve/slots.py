"""SlotPool: the state of many streams in one block of memory, stepped by number. For engines with streams of their own.

A slot is a row of a `DirectionState`, and a step addresses the rows of its streams in place, so it costs what they cost
and not what the pool holds. Steps run in batches of a few sizes (`batch_sizes`), which are recorded before the first
stream: on a CPU as native calls, on a GPU as CUDA graphs, where a batch is filled up with a slot of its own that never
advances.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InputError, shown
from ..models import checks
from ..models.codec import Codec
from ..models.runner import Pass
from ..runtime.cpu_graphs import MOST_FRAMES
from ..runtime.state import DirectionState

DIRECTIONS = ("encode", "decode")
MOST_GRAPHS = 7  # of a direction and number of frames, on a GPU, where each holds memory
LARGEST_RECORDED = 16  # streams in a batch on a CPU; with more, reading the weights no longer counts


class PoolFull(RuntimeError):
    """All slots are in use; one becomes free when a stream ends."""


class SlotPool:
    """State for `capacity` streams of a codec, on its device and in its dtype.

    Args:
        codec: a model; it must not change while the pool is in use.
        capacity: slots. Each takes `bytes_per_slot`.
        directions: "encode", "decode" or both.
        num_codebooks: codebooks that steps are recorded for; by default those of the codec.
    """

    def __init__(
        self, codec: Codec, capacity: int, *, directions: Sequence[str] = DIRECTIONS, num_codebooks: int | None = None
    ):
        checks.streamable(codec.config)
        self.codec = codec
        self.capacity = checks.batch_size(capacity)
        self.num_codebooks = codec.num_codebooks if num_codebooks is None else num_codebooks
        checks.codebook_count(self.num_codebooks, codec.config)
        unknown = [name for name in directions if name not in DIRECTIONS]
        if unknown or not directions:
            raise InputError(f"directions must be among {', '.join(DIRECTIONS)}, got {shown(list(directions))}")
        self.batch_sizes = batch_sizes(capacity, codec.device)
        self._states: dict[str, DirectionState] = {}
        with torch.inference_mode(False):  # so that it can be used inside and outside of inference mode
            for name in directions:
                checks.has_part(codec.encoder if name == "encode" else codec.decoder, f"{name}r", f"a pool to {name}")
                self._states[name] = codec.new_direction(name, capacity + 1)
                self._states[name].active[capacity] = False  # the slot that fills up batches
        self._free = list(range(capacity))[::-1]
        self._in_use: set[int] = set()
        self._quarantined: set[int] = set()

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one stream's state, in all directions."""
        states = self._states.values()
        return sum(buffer[0].nbytes for state in states for buffer in state.buffers.values())

    # Slots

    def acquire(self) -> int:
        """A free slot, at the start of a stream; raises PoolFull if there is none."""
        if not self._free:
            raise PoolFull(f"all {self.capacity} slots are in use")
        slot = self._free.pop()
        self._in_use.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; it is reset first. A slot whose reset fails is quarantined: it is never used again."""
        if slot not in self._in_use:
            raise InputError(f"slot {shown(slot)} is not in use")
        self._in_use.discard(slot)
        try:
            self.reset([slot])
        except Exception:
            self._quarantined.add(slot)
            raise
        self._free.append(slot)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    @property
    def quarantined(self) -> int:
        """How many slots cannot be used any more."""
        return len(self._quarantined)

    def reset(self, slots: Sequence[int] | Tensor) -> None:
        """Restart the streams of these slots."""
        rows = self._rows(slots)
        for state in self._states.values():
            state.reset(rows)

    # Steps

    @torch.no_grad()
    def step_encode(self, audio: Tensor, slots: Sequence[int] | Tensor, *, num_codebooks: int | None = None) -> Tensor:
        """Audio [n, channels, T * frame_size] of the streams in n different slots -> codes [n, K, T] int64.

        Raises InputError for a wrong shape, slots that repeat or do not exist and, on a CPU, samples that are NaN or
        infinite; nothing has changed then. On a GPU such samples count as 0.
        """
        codec = self.codec
        count = self.num_codebooks if num_codebooks is None else checks.codebook_count(num_codebooks, codec.config)
        audio = checks.audio(audio, codec.config).to(codec.device, codec.dtype)
        if audio.shape[-1] == 0 or audio.shape[-1] % codec.frame_size:
            raise InputError(f"audio must be whole frames of {codec.frame_size} samples, got {audio.shape[-1]}")
        return self._step(codec.encode_pass(count), checks.finite(audio)[0], slots)

    @torch.no_grad()
    def step_decode(self, codes: Tensor, slots: Sequence[int] | Tensor) -> Tensor:
        """Codes [n, K, T] of the streams in n different slots -> audio [n, channels, T * frame_size].

        Raises InputError as `step_encode` does, and for codes outside [0, codebook_size) on a CPU; on a GPU the nearest
        code stands in.
        """
        config = self.codec.config
        codes = checks.code_range(checks.codes(codes, config), config)[0].to(self.codec.device)
        if codes.shape[-1] == 0:
            raise InputError("codes must be at least one frame, got 0")
        return self._step(self.codec.decode_pass(), codes, slots)

    @torch.no_grad()
    def step_decode_latents(self, latents: Tensor, slots: Sequence[int] | Tensor) -> Tensor:
        """The same from latents [n, hidden, T], which streams with different numbers of codebooks have in common."""
        latents = checks.latents(latents, self.codec.config).to(self.codec.device, self.codec.dtype)
        return self._step(self.codec.decode_latent_pass(), latents, slots)

    def _step(self, run: Pass, x: Tensor, slots: Sequence[int] | Tensor) -> Tensor:
        if run.direction not in self._states:
            raise InputError(f"this pool does not {run.direction}: it was made for {', '.join(self._states)}")
        rows, state = self._rows(slots), self._states[run.direction]
        if len(rows) != len(x):
            raise InputError(f"{len(x)} rows need as many slots, got {len(rows)}")
        largest = self.batch_sizes[-1]
        results = [
            self._batch(run, some, named, state)
            for some, named in zip(x.split(largest), rows.split(largest), strict=True)
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _batch(self, run: Pass, x: Tensor, rows: Tensor, state: DirectionState) -> Tensor:
        """A step of at most the largest batch, filled up to the next one that is recorded."""
        count = len(x)
        missing = self.batch_sizes[bisect_left(self.batch_sizes, count)] - count
        if missing:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
            rows = torch.cat([rows, rows.new_full((missing,), self.capacity)])
        return run.in_tiles(x, state.select(rows))[:count]

    def _rows(self, slots: Sequence[int] | Tensor) -> Tensor:
        """Slots as a tensor on the device; those of a tensor on a GPU are not looked at."""
        if isinstance(slots, Tensor) and not slots.is_cpu:
            return slots.long()
        named = slots.tolist() if isinstance(slots, Tensor) else list(slots)
        if len(set(named)) != len(named) or not all(type(n) is int and 0 <= n < self.capacity for n in named):
            raise InputError(f"slots must be different integers in [0, {self.capacity}), got {shown(named)}")
        return torch.tensor(named, dtype=torch.int64).to(self.codec.device, non_blocking=True)

    # Recordings

    @torch.no_grad()
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Pack weights and record the steps of all batch sizes, so that no stream waits for it; slots must be free.

        progress: is called with how many recordings are done, of how many.
        """
        if self._in_use:
            raise InputError(f"a pool is warmed up before its first stream, slots in use: {len(self._in_use)}")
        steps = list(self._recordings())
        for done, (run, channels, frames, size) in enumerate(steps):
            if progress is not None:
                progress(done, len(steps))
            rows = torch.arange(size, device=self.codec.device)
            run.warm_up(channels, frames, self._states[run.direction].select(rows), threads=1)
        if progress is not None:
            progress(len(steps), len(steps))

    def _recordings(self) -> Iterator[tuple[Pass, int, int, int]]:
        """Pass, channels of its input, frames and batch size of each recording, the largest first: graphs share memory.

        On a CPU also those of a lone stream that catches up by several frames.
        """
        codec = self.codec
        passes = {
            "encode": (codec.encode_pass(self.num_codebooks), codec.config.audio_channels),
            "decode": (codec.decode_pass(), self.num_codebooks),
        }
        for direction in self._states:
            run, channels = passes[direction]
            for size in self.batch_sizes[::-1]:
                yield run, channels, 1, size
            for frames in range(2, MOST_FRAMES + 1) if codec.device.type == "cpu" else ():
                yield run, channels, frames, 1


def batch_sizes(capacity: int, device: torch.device) -> tuple[int, ...]:
    """The sizes of batches that steps run in, ascending.

    On a CPU each size up to 16: a stream more costs time. On a GPU at most 7 powers of two: a graph more costs memory.
    """
    if device.type == "cpu":
        return tuple(range(1, min(capacity, LARGEST_RECORDED) + 1))
    sizes = [capacity]
    while sizes[-1] > 1:
        sizes.append(1 << ((sizes[-1] - 1).bit_length() - 1))
    kept = sizes if len(sizes) <= MOST_GRAPHS else [*sizes[: MOST_GRAPHS - 1], 1]
    return tuple(sorted(kept))
