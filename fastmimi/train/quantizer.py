"""How codebooks learn: running means of the latents that fall to each entry, beside the gradients of the rest.

The search is the codec's own op. Counts and sums of all levels go through one all-reduce for each step, and with them
the latents that take the place of entries which nothing falls to (SoundStream, arXiv 2107.03312, section 3.3).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..models.codec import Codec
from ..models.quantizer import ResidualQuantizer
from ..runtime.ops import ForwardContext
from .config import QuantizerConfig
from .processes import of_first, place, rows_of_all, sum_of_all


class Quantized(NamedTuple):
    """What the quantizer made of latents [B, hidden, T]."""

    latents: Tensor  # [B, hidden, T], for the decoder: decoded, or raw
    semantic: Tensor  # [B, hidden, T], of the first levels, decoded
    commitment: Tensor  # mean square of what each level leaves, in its space
    explained: Tensor  # share of the latents' variance that all levels of the acoustic part give back
    codes: Tensor  # [B, K, T]


class _Statistics(NamedTuple):
    """Of a batch, for the levels of one residual quantizer."""

    counts: Tensor  # [L, S]
    sums: Tensor  # [L, S, D]
    candidates: Tensor  # [L, S, D] latents that may become entries


class RunningMeans(nn.Module):
    """The running counts and sums of one residual quantizer's entries, which it writes into that."""

    usage: Tensor  # [L, S]
    sums: Tensor  # [L, S, D]
    gathered: Tensor  # [N, D] latents, until there are entries; None where there were to begin with
    count: Tensor

    def __init__(self, part: ResidualQuantizer, config: QuantizerConfig, frozen: bool):
        super().__init__()
        self.config, self.frozen = config, frozen
        entries, usage = part.codebooks().clone(), part.usage()
        self.register_buffer("usage", usage)
        self.register_buffer("sums", entries * usage[..., None])
        if frozen and not self.begun:
            raise InputError("model.freeze names a quantizer that has no entries yet")
        empty = None if self.begun else entries.new_zeros(config.kmeans_latents, entries.shape[-1])
        self.register_buffer("gathered", empty)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def begun(self) -> bool:
        """Whether there are entries."""
        self._begun = getattr(self, "_begun", False) or bool(self.sums.any())
        return self._begun

    @torch.no_grad()
    def gather(self, rows: Tensor) -> None:
        """Keep latents [N, D] until there are enough for k-means, level after level."""
        done = int(self.count)
        rows = rows[: len(self.gathered) - done].float()
        self.gathered[done : done + len(rows)] = rows
        self.count += len(rows)
        if done + len(rows) < len(self.gathered):
            return
        rows = self.gathered
        for level in range(len(self.usage)):
            entries = of_first(kmeans(rows, self.usage.shape[1], self.config.kmeans_iterations))
            self.usage[level], self.sums[level] = 1, entries
            rows = rows - entries[_nearest(rows, entries)]

    @torch.no_grad()
    def update(self, seen: _Statistics, replace: bool) -> None:
        """Move towards what a batch of all processes showed."""
        decay = self.config.decay
        if self._counts_nothing():
            scale = seen.counts.mean()
            self.usage.mul_(scale)
            self.sums.mul_(scale)
        self.usage.lerp_(seen.counts, 1 - decay)
        self.sums.lerp_(seen.sums, 1 - decay)
        if replace:
            least = self.config.replace_below * self.usage.mean(dim=1, keepdim=True)
            dead = self.usage < least  # [L, S]
            self.usage.copy_(torch.where(dead, self.usage.mean(dim=1, keepdim=True), self.usage))
            self.sums.copy_(torch.where(dead[..., None], seen.candidates * self.usage[..., None], self.sums))

    def _counts_nothing(self) -> bool:
        """Whether each entry still stands for one latent, as k-means and checkpoints without counts leave it."""
        self._counts = getattr(self, "_counts", False) or not bool((self.usage == 1).all())
        return not self._counts

    @torch.no_grad()
    def write(self, part: ResidualQuantizer) -> None:
        part.learned(self.sums, self.usage)


class TrainedQuantizer(nn.Module):
    """A codec's split quantizer in training: straight-through, levels dropped, some sequences raw."""

    def __init__(self, codec: Codec, config: QuantizerConfig, frozen: Collection[nn.Module] = ()):
        super().__init__()
        self.config = config
        self.levels = codec.config.num_quantizers
        self.means: Any = nn.ModuleList(
            RunningMeans(part, config, part in frozen) for part, _ in codec.quantizer.parts(self.levels)
        )
        self._seen: list[_Statistics] = []

    def forward(self, codec: Codec, latents: Tensor, context: ForwardContext, step: int) -> Quantized:
        """Latents [B, hidden, T] before the quantizer; `update` follows once for each of these."""
        batch, unprojected = len(latents), 0
        kept = self._levels(batch, latents.device)  # [B]
        total, commitments, codes, decoded, left, self._seen = None, [], [], [], [], []
        first = 0
        for (part, count), means in zip(codec.quantizer.parts(self.levels), self.means, strict=True):
            projected = part.project(latents, context)
            unprojected += part.output_proj is None
            rows = projected.transpose(1, 2).flatten(0, 1).float()  # [B * T, D]
            with torch.autocast(latents.device.type, enabled=False):  # the search is fp32, and what it leaves
                if not means.begun and step >= self.config.begin:
                    means.gather(rows_of_all(rows.detach()))
                    means.write(part)
                books = part.codebooks()
                found = context.ops.rvq_encode(rows.detach(), books)  # [L, B * T]
                chosen, seen, residual, commitment = torch.zeros_like(rows), [], rows, rows.new_zeros(())
                for level in range(count):
                    entry = books[level][found[level]]
                    commitment = commitment + F.mse_loss(residual, entry)
                    seen.append(_statistics(residual.detach(), found[level], len(books[level])))
                    residual = residual - entry
                    alive = (first + level < kept).repeat_interleave(latents.shape[-1])[:, None]
                    chosen = chosen + torch.where(alive, entry, 0)
            self._seen.append(_Statistics(*map(torch.stack, zip(*seen, strict=True))))
            straight = projected  # until there are entries: of zeros, distillation's gradient would never fade
            if means.begun:
                straight = projected + (chosen.unflatten(0, (batch, -1)).transpose(1, 2) - projected).detach()
            quantized = part.unproject(straight, context)
            # a quantizer all of whose levels are dropped adds nothing
            total = quantized if total is None else total + torch.where((kept > first)[:, None, None], quantized, 0)
            commitments.append(commitment / count)
            centred = rows.detach() - rows.detach().mean(dim=0)
            left.append(residual.detach().square().sum() / centred.square().sum().clamp(min=1e-12))
            codes.append(found.unflatten(1, (batch, -1)).transpose(0, 1))
            decoded.append(quantized)
            first += count
        assert total is not None
        begun = all(means.begun for means in self.means)
        raw = torch.rand(batch, device=latents.device) < (self.config.raw if begun else 1.0)
        # where nothing is projected, each part gives the latents back, and the decoder knows them as their sum
        total = torch.where(raw[:, None, None], latents * max(unprojected, 1), total)
        committed = torch.stack(commitments).mean() * begun
        return Quantized(total, decoded[0], committed, 1 - left[-1], torch.cat(codes, dim=1))

    def _levels(self, batch: int, device: torch.device) -> Tensor:
        """How many levels each sequence keeps [B]: the semantic ones at least."""
        if not self.config.dropout:
            return torch.full((batch,), self.levels, device=device)
        least = len(self.means[0].usage)
        return torch.randint(least, self.levels + 1, (batch,), device=device)

    @torch.no_grad()
    def update(self, codec: Codec, step: int) -> None:
        """Move the entries by what the last batch showed, of all processes; the same in each."""
        seen, self._seen = self._seen, []
        if all(means.frozen for means in self.means) or not all(means.begun for means in self.means):
            return
        together = torch.cat([t.flatten() for statistics in seen for t in statistics])
        parts = iter(sum_of_all(together).split([t.numel() for statistics in seen for t in statistics]))
        for (part, _), means, local in zip(codec.quantizer.parts(self.levels), self.means, seen, strict=True):
            statistics = _Statistics(*(next(parts).view_as(t) for t in local))
            if not means.frozen:
                means.update(statistics, replace=step % self.config.replace_every == 0)
                means.write(part)


def _statistics(rows: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of latents [N, D] and the entries that they fell to [N]."""
    rows = rows.float()
    counts = torch.bincount(codes, minlength=size).to(rows.dtype)
    sums = rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
    # each process offers its share of the candidates, and zeros for the others'
    candidates = rows[torch.randint(len(rows), (size,), device=rows.device)]
    rank, processes = place()
    mine = torch.arange(size, device=rows.device) % processes == rank
    return counts, sums, torch.where(mine[:, None], candidates, 0)


def kmeans(rows: Tensor, size: int, iterations: int) -> Tensor:
    """Centres [size, D] of rows [N, D], which may be fewer; the same for the same rows."""
    rows = rows.float()
    draw = torch.Generator().manual_seed(len(rows))
    picked = torch.randperm(len(rows), generator=draw)[:size]
    picked = torch.cat([picked, torch.randint(len(rows), (size - len(picked),), generator=draw)])
    centres = rows[picked.to(rows.device)]
    for _ in range(iterations):
        codes = _nearest(rows, centres)
        counts = torch.bincount(codes, minlength=size)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(dim=1), rows.float(), centres.t(), alpha=-2).argmin(dim=1)
