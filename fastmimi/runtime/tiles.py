"""How much audio passes a codec at once: long audio goes in tiles that carry state, so that memory is bounded.

On an accelerator launches should be long. On a CPU the layers near the audio take smaller pieces of a tile, whose
widest activation (5 MB in fp32) stays in a level-3 cache; the slow layers, whose weights are large, take all of it.
Lengths are those of 64 channels near the audio: with more channels, tiles and pieces are shorter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cpu_graphs import MOST_FRAMES

TILE_SAMPLES = 480_000  # of all rows together
PIECE_SAMPLES = 19_200
TILE_SAMPLES_ACCELERATOR = 2_400_000


@dataclass(frozen=True)
class Tiling:
    """Lengths of tiles and pieces for a codec whose frames have `frame_size` samples and `positions` of the transformer.

    `filters` are the channels of its layers nearest to the audio.
    """

    frame_size: int
    positions: int
    filters: int

    @property
    def _width(self) -> int:
        return max(1, self.filters // 64)

    def frames_per_tile(self, batch: int, device: str) -> int:
        samples = TILE_SAMPLES if device == "cpu" else TILE_SAMPLES_ACCELERATOR
        return max(1, samples // (batch * self.frame_size * self._width))

    def positions_per_piece(self, batch: int, device: str) -> int | None:
        """Transformer positions that the layers near the audio take at once; None: all."""
        if device != "cpu":
            return None
        least = MOST_FRAMES * self.positions  # cpu_graphs.py: short steps are not cut
        return max(least, PIECE_SAMPLES * self.positions // (batch * self.frame_size * self._width))

    def most_frames_at_once(self, batch: int, device: str) -> int:
        """Frames above which tiles or pieces are worth their state."""
        piece = self.positions_per_piece(batch, device)
        return self.frames_per_tile(batch, device) if piece is None else piece // self.positions


def filled(audio: Tensor, frame_size: int) -> Tensor:
    """Audio [B, C, N], an incomplete last frame completed with zeros; a copy only then."""
    missing = -audio.shape[-1] % frame_size
    return pad(audio, (0, missing)) if missing else audio


def joined(parts: list[Tensor], dim: int = 1) -> Tensor:
    """One tensor of the parts; a copy only if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def collected(parts: Iterable[Tensor], length: int, size: int, dim: int = -1) -> Tensor:
    """Results of an input of `length` that passes in parts of `size`, one behind another along `dim`.

    As `torch.cat`, but each part is copied as it comes, into a result that is allocated with the first. Parts that stay
    alive until the last one would lie scattered between the large activations of the others and fragment the memory.
    """
    result, done = None, 0
    for part in parts:
        if length <= size:
            return part
        if result is None:
            shape = list(part.shape)
            shape[dim] = -(-length * part.shape[dim] // size)
            result = part.new_empty(shape)
        result.narrow(dim, done, part.shape[dim]).copy_(part)
        done += part.shape[dim]
    assert result is not None and done == result.shape[dim], "the parts are those of the input"
    return result
