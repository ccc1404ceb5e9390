"""Ragged batches: rows of different lengths in one tensor, padded on the left or on the right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from . import masks


@dataclass
class Ragged:
    """Where the content of each row of a [B, total] batch is: `lengths` [B] items beginning at `starts` [B], int64."""

    starts: Tensor
    lengths: Tensor
    total: int

    @classmethod
    def of(cls, mask: Tensor) -> Ragged:
        """From a mask [B, N] (or [B, channels, N]) that is nonzero at the content, one contiguous run per row."""
        mask = masks.as_tensor(mask, "padding_mask")
        if mask.dim() == 3:
            mask = mask.bool().any(dim=1)
        if mask.dim() != 2:
            raise InputError(f"padding_mask must be [batch, samples], got {tuple(mask.shape)}")
        mask = mask.bool()
        total = mask.shape[1]
        lengths = mask.sum(dim=1)
        starts = torch.where(lengths > 0, mask.int().argmax(dim=1) if total else 0, 0)
        ragged = cls(starts, lengths, total)
        holes = (ragged.mask != mask).any(dim=1)
        if not torch.compiler.is_compiling() and holes.any():
            row = int(holes.nonzero()[0])
            raise InputError(f"padding_mask must pad on the left or the right only, but row {row} has a gap")
        return ragged

    @property
    def mask(self) -> Tensor:
        """[B, total] bool."""
        steps = torch.arange(self.total, device=self.lengths.device)
        return (steps >= self.starts[:, None]) & (steps < (self.starts + self.lengths)[:, None])

    def frames(self, size: int) -> Ragged:
        """The same in frames of `size`, counting an incomplete one; rows padded on the left stay right-aligned."""
        lengths, total = -(-self.lengths // size), -(-self.total // size)
        at_end = (self.starts > 0) & (self.starts + self.lengths == self.total)
        return Ragged(torch.where(at_end, total - lengths, 0), lengths, total)

    def times(self, size: int) -> Ragged:
        """The same with each item replaced by `size` items."""
        return Ragged(self.starts * size, self.lengths * size, self.total * size)

    def align(self, x: Tensor) -> Tensor:
        """x [B, C, total] with every row left-aligned and 0 beyond its length."""
        steps = torch.arange(self.total, device=x.device)
        if torch.compiler.is_compiling() or self.starts.any():  # traced, the values are not known
            index = (steps + self.starts[:, None]).clamp(max=self.total - 1)
            x = x.gather(2, index[:, None].expand(-1, x.shape[1], -1))
        return torch.where((steps < self.lengths[:, None])[:, None], x, 0)

    def restore(self, x: Tensor) -> Tensor:
        """Undo `align`: left-aligned rows [B, C, T] -> [B, C, total] with each row at its original place."""
        if not torch.compiler.is_compiling() and not self.starts.any() and x.shape[-1] == self.total:
            return x
        index = (torch.arange(self.total, device=x.device) - self.starts[:, None]).clamp(0, x.shape[-1] - 1)
        return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))

    def by_length(self, x: Tensor, run: Callable[[Tensor], Tensor], out: Ragged) -> Tensor:
        """Call `run` on rows of equal length, cut to it: aligned [B, C, total] -> aligned [B, C', out.total]."""
        rows = [(self.lengths == length).nonzero()[:, 0] for length in self.lengths.unique()]
        results = [run(x[index, :, : int(self.lengths[index[0]])]) for index in rows]
        merged = x.new_zeros(x.shape[0], results[0].shape[1], out.total, dtype=results[0].dtype)
        for index, result in zip(rows, results, strict=True):
            merged[index, :, : result.shape[-1]] = result
        return merged
