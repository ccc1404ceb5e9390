"""How much audio passes through a codec at once: long audio runs in tiles with streaming state, in bounded memory.

On an accelerator kernels should run long, so a tile takes what memory there is. On a CPU the layers near the audio take
a tile in subtiles, whose widest activation (6 MB in fp32) stays in a level-3 cache; the slow layers, whose weights are
large, take all of it. Lengths are those of 64 channels near the audio: with more channels, they are shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cpu_graphs import MOST_FRAMES

TILE_SAMPLES = 480_000  # of all rows of a batch together
SUBTILE_SAMPLES = 24_960  # in fp32: 13 frames, so that a clip of a second is not cut
TILE_SAMPLES_ACCELERATOR = 2_400_000  # at the least
ACTIVATIONS = 4  # of the layers nearest to the audio that exist at the same time: three, and some space
SHARE = 0.5  # of the free memory that a tile's activations may take


@dataclass(frozen=True)
class Tiling:
    """Lengths for a codec whose frames have `frame_size` samples and `positions` of the transformer.

    `filters` are the channels of its layers nearest to the audio.
    """

    frame_size: int
    positions: int
    filters: int

    @property
    def _width(self) -> int:
        return max(1, self.filters // 64)

    def frames_per_tile(self, frames: int, batch: int, device: torch.device, dtype: torch.dtype) -> int:
        """How many of so many frames of a batch pass through all layers at once, at least 1."""
        samples = TILE_SAMPLES if device.type == "cpu" else TILE_SAMPLES_ACCELERATOR
        needed = batch * frames * self.frame_size
        if device.type == "cuda" and needed * self._width > samples:
            per_sample = self.filters * dtype.itemsize * ACTIVATIONS
            samples = max(samples, int(SHARE * free_bytes(device)) // per_sample * self._width)
        return max(1, samples // (batch * self.frame_size * self._width))

    def positions_per_subtile(self, batch: int, device: torch.device, dtype: torch.dtype) -> int | None:
        """Transformer positions that the layers near the audio take at once; None: all."""
        if device.type != "cpu":
            return None
        least = MOST_FRAMES * self.positions  # cpu_graphs.py: short steps are not cut
        samples = SUBTILE_SAMPLES * 4 // dtype.itemsize
        return max(least, samples * self.positions // (batch * self.frame_size * self._width))

    def runs_at_once(self, frames: int, batch: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether so many frames need neither tiles nor subtiles."""
        subtile = self.positions_per_subtile(batch, device, dtype)
        most = self.frames_per_tile(frames, batch, device, dtype) if subtile is None else subtile // self.positions
        return frames <= most


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that PyTorch can allocate: what nobody has, and what its allocator holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
