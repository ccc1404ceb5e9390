"""How much audio passes through a codec at once: long audio runs in tiles with streaming state, in bounded memory.

On an accelerator kernels should run long. On a CPU the layers near the audio take a tile in subtiles, whose widest
activation (5 MB in fp32) stays in a level-3 cache; the slow layers, whose weights are large, take all of it. Lengths
are those of 64 channels near the audio: with more channels, tiles and subtiles are shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cpu_graphs import MOST_FRAMES

TILE_SAMPLES = 480_000  # of all rows of a batch together
SUBTILE_SAMPLES = 19_200
TILE_SAMPLES_ACCELERATOR = 2_400_000


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

    def frames_per_tile(self, batch: int, device: str) -> int:
        samples = TILE_SAMPLES if device == "cpu" else TILE_SAMPLES_ACCELERATOR
        return max(1, samples // (batch * self.frame_size * self._width))

    def positions_per_subtile(self, batch: int, device: str) -> int | None:
        """Transformer positions that the layers near the audio take at once; None: all."""
        if device != "cpu":
            return None
        least = MOST_FRAMES * self.positions  # cpu_graphs.py: short steps are not cut
        return max(least, SUBTILE_SAMPLES * self.positions // (batch * self.frame_size * self._width))

    def most_frames_at_once(self, batch: int, device: str) -> int:
        """Frames beyond which audio runs in tiles or subtiles."""
        subtile = self.positions_per_subtile(batch, device)
        return self.frames_per_tile(batch, device) if subtile is None else subtile // self.positions
