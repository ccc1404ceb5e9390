"""Training of the codebooks: each entry is an exponential moving average of the latents assigned to it.

All other parameters are trained by gradients, which pass the quantizer straight-through. The nearest entries are found
by the codec's own op `rvq_encode`. One all-reduce per step sums the counts and sums of all levels over the processes,
together with the candidates that replace unused entries (SoundStream, arXiv 2107.03312, section 3.3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models.codec import Codec
from ..models.quantizer import ResidualQuantizer
from ..runtime.ops import ForwardContext
from .config import QuantizerConfig
from .distributed import all_gather_rows, all_reduce_sum, broadcast_from_rank_0, rank_and_world_size


class Statistics(NamedTuple):
    """Statistics of one batch for the L levels of one residual quantizer with codebooks of S entries of size D."""

    counts: Tensor  # [L, S], how many latents are assigned to each entry
    sums: Tensor  # [L, S, D], the sums of these latents
    candidates: Tensor  # [L, S, D], random latents that may replace unused entries


class Quantized(NamedTuple):
    """The result of quantizing latents [B, hidden, T]."""

    latents: Tensor  # [B, hidden, T], input of the decoder: quantized, or for some sequences not
    semantic: Tensor  # [B, hidden, T], decoded from the semantic levels alone
    codes: Tensor  # [B, K, T]
    commitment: Tensor  # commitment loss: mean squared residual after each level, in the codebooks' space
    explained: Tensor  # fraction of the variance of the latents that the acoustic levels explain
    statistics: list[Statistics]  # of each residual quantizer, for the update of its codebooks


class CodebookEMA(nn.Module):
    """Exponential moving averages of counts and sums of latents for one residual quantizer; sum / count is an entry.

    They are updated here alone. `write` copies them to the codec, which stores what its checkpoints have: a Mimi
    both, a JODIO the entries.
    """

    usage: Tensor  # [L, S], averaged counts
    sums: Tensor  # [L, S, D], averaged sums
    gathered: Tensor | None  # [N, D], latents for k-means; None if the entries came from a checkpoint
    count: Tensor  # of the latents in `gathered`

    def __init__(self, part: ResidualQuantizer, config: QuantizerConfig, frozen: bool):
        super().__init__()
        self.config, self.frozen = config, frozen
        entries, usage = part.codebooks().clone(), part.usage()
        self.register_buffer("usage", usage)
        self.register_buffer("sums", entries * usage[..., None])
        new = not self.sums.any()
        if frozen and new:
            raise InputError("model.freeze names a quantizer that has no entries yet")
        self.register_buffer("gathered", entries.new_zeros(config.kmeans_latents, entries.shape[-1]) if new else None)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def initialized(self) -> bool:
        """Whether the codebooks have entries, from a checkpoint or from k-means."""
        return self.gathered is None or int(self.count) == len(self.gathered)

    @torch.no_grad()
    def collect_for_kmeans(self, rows: Tensor) -> None:
        """Store latents [N, D]; once there are enough, initialize the codebooks by k-means, level after level."""
        assert self.gathered is not None
        done = int(self.count)
        rows = rows[: len(self.gathered) - done].float()
        self.gathered[done : done + len(rows)] = rows
        self.count += len(rows)
        if not self.initialized:
            return
        rows = self.gathered
        for level in range(len(self.usage)):
            entries = broadcast_from_rank_0(kmeans(rows, self.usage.shape[1], self.config.kmeans_iterations))
            self.usage[level], self.sums[level] = 1, entries
            rows = rows - entries[_nearest(rows, entries)]

    @torch.no_grad()
    def update(self, batch: Statistics, replace: bool) -> None:
        """Update the moving averages with a batch's statistics, summed over all processes; `replace` unused entries."""
        # After k-means, or in a checkpoint without counts, every count is 1. The first batch would outweigh such
        # entries: they are scaled to its mean count.
        scale = torch.where((self.usage == 1).all(), batch.counts.mean(), 1)
        for averages, values in ((self.usage, batch.counts), (self.sums, batch.sums)):
            averages.mul_(scale).lerp_(values, 1 - self.config.decay)
        if replace:
            mean = self.usage.mean(dim=1, keepdim=True)
            unused = self.usage < self.config.replace_below * mean  # [L, S]
            self.usage.copy_(torch.where(unused, mean, self.usage))
            self.sums.copy_(torch.where(unused[..., None], batch.candidates * self.usage[..., None], self.sums))

    @torch.no_grad()
    def write(self, part: ResidualQuantizer) -> None:
        """Set the quantizer's entries to the averages."""
        part.learned(self.sums, self.usage)


class TrainedQuantizer(nn.Module):
    """A codec's split quantizer in training: straight-through gradients, quantizer dropout, and a random bypass."""

    def __init__(self, codec: Codec, config: QuantizerConfig, frozen: Collection[nn.Module] = ()):
        super().__init__()
        self.config = config
        self.levels = codec.config.num_quantizers
        if config.dropout and config.kept_levels > self.levels:
            raise InputError(f"quantizer.kept_levels must be at most {self.levels}, got {config.kept_levels}")
        self.means: Any = nn.ModuleList(
            CodebookEMA(part, config, part in frozen) for part, _ in codec.quantizer.parts(self.levels)
        )

    def forward(self, codec: Codec, latents: Tensor, context: ForwardContext, step: int) -> Quantized:
        """Quantize latents [B, hidden, T]. From step `begin` on, new codebooks are initialized with them first."""
        batch, unprojected = len(latents), 0
        kept = self._draw_kept_levels(batch, latents.device)  # [B]
        total, commitments, codes, decoded, unexplained, statistics = None, [], [], [], [], []
        first = 0
        for (part, count), means in zip(codec.quantizer.parts(self.levels), self.means, strict=True):
            projected = part.project(latents, context)
            unprojected += part.output_proj is None
            rows = projected.transpose(1, 2).flatten(0, 1).float()  # [B * T, D]
            with torch.autocast(latents.device.type, enabled=False):  # search and residuals are fp32
                if not means.initialized and step >= self.config.begin:
                    means.collect_for_kmeans(all_gather_rows(rows.detach()))
                    means.write(part)
                books = part.codebooks()
                assigned = context.ops.rvq_encode(rows.detach(), books)  # [L, B * T]
                keep = (kept - first).repeat_interleave(latents.shape[-1])  # [B * T]
                summed, residual, commitment, batch_statistics = _quantize_rows(rows, books, assigned, keep)
            statistics.append(batch_statistics)
            # Without entries, pass the latents on: the semantic levels would decode to a constant that the latents do
            # not change, and the straight-through gradient of the distillation would make the latents grow for ever.
            straight_through = projected
            if means.initialized:
                straight_through = projected + (summed.unflatten(0, (batch, -1)).transpose(1, 2) - projected).detach()
            quantized = part.unproject(straight_through, context)
            # a residual quantizer of which all levels are dropped contributes nothing
            total = quantized if total is None else total + torch.where((kept > first)[:, None, None], quantized, 0)
            commitments.append(commitment)
            centred = rows.detach() - rows.detach().mean(dim=0)
            unexplained.append(residual.detach().square().sum() / centred.square().sum().clamp(min=1e-12))
            codes.append(assigned.unflatten(1, (batch, -1)).transpose(0, 1))
            decoded.append(quantized)
            first += count
        assert total is not None
        initialized = all(means.initialized for means in self.means)
        bypass = torch.rand(batch, device=latents.device) < (self.config.raw if initialized else 1.0)
        # Residual quantizers without projections each reconstruct the latents themselves, and the decoder's input is
        # the sum: unquantized latents are scaled to the same magnitude.
        total = torch.where(bypass[:, None, None], latents * max(unprojected, 1), total)
        commitment = torch.stack(commitments).mean() * initialized
        return Quantized(total, decoded[0], torch.cat(codes, dim=1), commitment, 1 - unexplained[-1], statistics)

    def _draw_kept_levels(self, batch: int, device: torch.device) -> Tensor:
        """Quantizer dropout: the number of levels of each sequence [B], at least `kept_levels`, semantic ones too."""
        if not self.config.dropout:
            return torch.full((batch,), self.levels, device=device)
        least = max(self.config.kept_levels, len(self.means[0].usage))
        return torch.randint(least, self.levels + 1, (batch,), device=device)

    @torch.no_grad()
    def update(self, codec: Codec, batch: Sequence[Statistics], step: int) -> None:
        """Update the codebooks with a batch's statistics of all processes; the result is the same in each."""
        if all(means.frozen for means in self.means) or not all(means.initialized for means in self.means):
            return
        tensors = [tensor for statistics in batch for tensor in statistics]
        reduced = all_reduce_sum(torch.cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
        summed = iter(reduced)
        for (part, _), means, local in zip(codec.quantizer.parts(self.levels), self.means, batch, strict=True):
            statistics = Statistics(*(next(summed).view_as(tensor) for tensor in local))
            if not means.frozen:
                means.update(statistics, replace=step % self.config.replace_every == 0)
                means.write(part)


def _quantize_rows(
    rows: Tensor, books: Tensor, codes: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Statistics]:
    """Quantize latents [N, D] with codebooks [L, S, D], whose nearest entries have the codes [L, N], level after level.

    Returns the sum of the entries of the first `keep` [N] levels [N, D], the residual after all levels [N, D], the
    commitment loss, and the statistics of the latents.
    """
    summed, residual, commitment, statistics = torch.zeros_like(rows), rows, rows.new_zeros(()), []
    for level, (book, chosen) in enumerate(zip(books, codes, strict=True)):
        entry = book[chosen]
        commitment = commitment + F.mse_loss(residual, entry)
        statistics.append(_level_statistics(residual.detach(), chosen, len(book)))
        residual = residual - entry
        summed = summed + torch.where((level < keep)[:, None], entry, 0)
    return summed, residual, commitment / len(books), Statistics(*map(torch.stack, zip(*statistics, strict=True)))


def _level_statistics(rows: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [S], sums [S, D] and candidates [S, D] of latents [N, D] and the codes of their nearest entries [N]."""
    rows = rows.float()
    counts = torch.bincount(codes, minlength=size).to(rows.dtype)
    sums = rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
    # process r supplies the candidates for entries r, r + processes, ... and zeros for the others: the sum over all
    # processes then holds one candidate for each entry
    candidates = rows[torch.randint(len(rows), (size,), device=rows.device)]
    rank, processes = rank_and_world_size()
    mine = torch.arange(size, device=rows.device) % processes == rank
    return counts, sums, torch.where(mine[:, None], candidates, 0)


def kmeans(rows: Tensor, size: int, iterations: int) -> Tensor:
    """k-means: `size` centres [size, D] of rows [N, D]; deterministic. N may be smaller than `size`."""
    rows = rows.float()
    generator = torch.Generator().manual_seed(len(rows))
    picked = torch.randperm(len(rows), generator=generator)[:size]
    picked = torch.cat([picked, torch.randint(len(rows), (size - len(picked),), generator=generator)])
    centres = rows[picked.to(rows.device)]
    for _ in range(iterations):
        codes = _nearest(rows, centres)
        counts = torch.bincount(codes, minlength=size)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre for each row [N]."""
    return torch.addmm(centres.square().sum(dim=1), rows.float(), centres.t(), alpha=-2).argmin(dim=1)
