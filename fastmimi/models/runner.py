"""Runs a pass through a codec: at once, in tiles, over a ragged batch, or as chunks of streams.

All ways give the same numbers: a tile is a chunk of a stream, and a row of a ragged batch is followed by what it would
be padded with on its own. A pass is a composition of the codec's four transforms (codec.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.arrivals import owned
from ..runtime.ops import ForwardContext
from ..runtime.ragged import Ragged
from ..runtime.state import DirectionState

if TYPE_CHECKING:
    from .codec import Codec

Step = Callable[[Tensor, ForwardContext], list[Tensor]]


@dataclass
class Pass:
    """One direction of a codec, from [B, C, T * unit] to [B, channels, T * result_unit], T in frames.

    direction: "encode" or "decode", whose streaming state and recorded graphs it uses.
    step: computes the pass; it returns the result in parts, to be concatenated along dimension 1, since a recorded
        step (runtime/cpu_graphs.py) cannot concatenate them itself.
    key: distinguishes the passes of a direction that take the same input.
    """

    codec: Codec
    direction: str
    step: Step
    key: int | str
    unit: int
    result_unit: int
    channels: int
    dtype: torch.dtype

    def whole(self, x: Tensor, lengths: Tensor | None = None, fill: bool = True) -> Tensor:
        """The result for x [B, C, N], in tiles if it is long; differentiable.

        lengths: [B] elements of x that belong to each row, if layers are to be padded beyond them.
        fill: complete the last frame with zeros; without it, each layer pads its own input.
        """
        frames = self._frames(x)
        if frames > 0 and not self._needs_tiles(x, frames):
            x = self._filled(x) if fill else x
            return _joined(self.step(x, self.codec.forward_context(len(x), None, lengths)))
        return self.in_tiles(x, self.codec.new_direction(self.direction, len(x)), lengths, fill)

    def in_tiles(self, x: Tensor, state: DirectionState, lengths: Tensor | None = None, fill: bool = True) -> Tensor:
        """The result for x [B, C, N] that continues the streams of `state`, which advances. Memory is bounded."""
        codec, frames = self.codec, self._frames(x)
        tile = codec.tiling.frames_per_tile(frames, len(x), x.device, codec.dtype)
        result = None
        if frames == 0 or frames > tile:
            # allocated before the activations of the tiles, so that results do not fragment the memory between them
            result = x.new_empty(len(x), self.channels, frames * self.result_unit, dtype=self.dtype)
        for start in range(0, frames, tile):
            part = x[..., start * self.unit : (start + tile) * self.unit]
            inside = None if lengths is None else (lengths - start * self.unit).clamp(0, part.shape[-1])
            part = self._filled(part) if fill else part
            graphs = codec.graphs[self.direction]
            found = None if inside is not None else graphs.run(codec.ops, part, state, self.key)
            if found is None:
                with _counters_of(state):
                    found = self.step(part, codec.forward_context(len(part), state, inside))
            if result is None:  # one tile is all
                return _joined(found)
            channel, here = 0, result[..., start * self.result_unit : (start + tile) * self.result_unit]
            for y in found:
                here[:, channel : channel + y.shape[1]] = y
                channel += y.shape[1]
        assert result is not None
        return result

    def ragged(
        self, x: Tensor, rows: Ragged, results: Ragged, lengths: Tensor | None = None, fill: bool = True
    ) -> Tensor:
        """The result for a ragged batch of left-aligned rows x [B, C, N], each identical to running the row alone.

        rows, results: where the rows belong in the input and in the result, whose other elements are arbitrary.
        """
        if self.codec.config.streamable:
            return results.restore(self.whole(x, lengths, fill))
        # not causal, so what follows a row's end would change it: rows of equal length run together
        return results.restore(rows.by_length(x, lambda x: self.whole(x, None, fill), results))

    def of_streams(self, x: Tensor, state: DirectionState, valid: Tensor, bounds: list[int]) -> Tensor:
        """The result for a chunk of frames, of which `valid` [B, T] advance streams; constant between `bounds`."""
        results = []
        for start, stop in pairwise(bounds):
            if stop > start:
                state.active.copy_(valid[:, start])
                results.append(self.in_tiles(x[..., start * self.unit : stop * self.unit], state))
        return _joined(results, dim=-1) if results else self.in_tiles(x[..., :0], state)

    def warm_up(self, channels: int, frames: int, state: DirectionState, threads: int) -> None:
        """Pack weights, and record the pass for chunks [B, channels, frames * unit] of the streams of `state`."""
        codec, device, shape = self.codec, state.offset.device, (state.batch_size, channels, frames * self.unit)
        draw = torch.Generator(device).manual_seed(0)
        if self.key == "codes":
            entries = codec.config.codebook_size
            examples = [torch.randint(entries, shape, generator=draw, device=device) for _ in range(3)]
        else:
            empty = torch.empty(shape, dtype=codec.dtype, device=device)
            examples = [empty.clone().normal_(std=0.1, generator=draw) for _ in range(3)]
        codec.graphs[self.direction].record(codec, codec.ops, self._with_state, examples, state, threads, self.key)

    def _with_state(self, x: Tensor, state: DirectionState) -> list[Tensor]:
        with _counters_of(state):
            return self.step(x, self.codec.forward_context(len(x), state))

    def _frames(self, x: Tensor) -> int:
        return -(-x.shape[-1] // self.unit)

    def _filled(self, x: Tensor) -> Tensor:
        """x with its last frame completed by zeros; a copy only then."""
        missing = -x.shape[-1] % self.unit
        return pad(x, (0, missing)) if missing else x

    def _needs_tiles(self, x: Tensor, frames: int) -> bool:
        """Whether x is long enough for tiles, and tiles are possible."""
        codec = self.codec
        if codec.tiling.runs_at_once(frames, len(x), x.device, codec.dtype) or not codec.config.streamable:
            return False
        # state is written in place, which autograd cannot differentiate through
        return not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in codec.parameters())))


def _counters_of(state: DirectionState) -> AbstractContextManager[None]:
    """Within it, kernels on a GPU use the arrival counters of the state."""
    if state.offset.is_cpu or torch.compiler.is_compiling():
        return nullcontext()
    return owned(state.arrivals)


def _joined(parts: list[Tensor], dim: int = 1) -> Tensor:
    """One tensor of the parts; a copy only if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
