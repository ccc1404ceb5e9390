"""Split residual vector quantisation (arXiv 2410.00037, section 3.3.2): one semantic VQ beside an acoustic RVQ.

Codebooks are kept as the running sums that training updates; the centroids (sum / usage) are computed in fp32, stay
fp32 in half-precision models, and are recomputed when a sum or a usage changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..runtime import packing
from ..runtime.ops import ForwardContext
from .config import MimiCodecConfig

Module = TypeVar("Module", bound=nn.Module)
EPSILON = 1e-5  # least usage of an entry, as in both peers


class Codebook(nn.Module):
    """The running sums of one level: `embed_sum` [S, D] and `cluster_usage` [S]; peer: `MimiEuclideanCodebook`."""

    embed_sum: Tensor
    cluster_usage: Tensor

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.register_buffer("initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(config.codebook_size))
        self.register_buffer("embed_sum", torch.zeros(config.codebook_size, config.codebook_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        return apply_in_full_precision(self, fn)


def apply_in_full_precision(module: Module, fn: Callable[[Tensor], Tensor]) -> Module:
    """`nn.Module._apply` for buffers that follow moves and `.double()`, but never become half precision."""
    for name, buffer in module.named_buffers(recurse=False):
        moved = fn(buffer)
        if moved.is_floating_point() and moved.element_size() < 4:
            moved = buffer.to(moved.device, torch.float32)
        setattr(module, name, moved)
    return module


def centroids(embed_sum: Tensor, cluster_usage: Tensor) -> Tensor:
    """Entries [S, D] of a codebook's running sums, in fp32 or better."""
    wide = torch.promote_types(embed_sum.dtype, torch.float32)
    return embed_sum.to(wide) / cluster_usage.to(wide).clamp(min=EPSILON)[:, None]


class Level(nn.Module):
    """One level of a residual quantizer; its name gives checkpoints their keys `layers.<i>.codebook`."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.codebook = Codebook(config)


class ResidualQuantizer(nn.Module):
    """Latents [B, hidden, T] -> codes [B, L, T] in a space of D, and back. A subclass stores the entries."""

    def __init__(self) -> None:
        super().__init__()
        self.input_proj: nn.Conv1d | None = None
        self.output_proj: nn.Conv1d | None = None

    def __len__(self) -> int:
        """How many levels there are."""
        raise NotImplementedError

    def _stored(self) -> tuple[Tensor, ...]:
        """The tensors that the entries of all levels are computed from."""
        raise NotImplementedError

    def _entries(self, *stored: Tensor) -> Tensor:
        """The entries of all levels [L, S, D]."""
        raise NotImplementedError

    def usage(self) -> Tensor:
        """Exponential moving average of how often each entry was chosen [L, S]; ones if it is not stored."""
        raise NotImplementedError

    def learned(self, sums: Tensor, usage: Tensor) -> None:
        """Store running sums [L, S, D] and counts [L, S] of latents; their ratio are the entries."""
        raise NotImplementedError

    def codebooks(self, levels: int | None = None) -> Tensor:
        """Entries of the first levels (all of them without the number) [L, S, D].

        Cached until the stored tensors change; the same tensor is returned until then, so that kernels can cache what
        they derive from it. Edits through `.data` increment no version counter and go unnoticed.
        """
        if torch.compiler.is_compiling():  # tracing sees no versions
            return self._entries(*self._stored())[:levels]
        whole = packing.packed(self._stored(), "entries", self._entries)
        return packing.packed(whole, f"first {levels} levels", lambda books: books[:levels])

    def project(self, latents: Tensor, context: ForwardContext) -> Tensor:
        """[B, hidden, T] -> [B, D, T]."""
        return latents if self.input_proj is None else context.ops.causal_conv1d(latents, self.input_proj.weight)

    def unproject(self, quantized: Tensor, context: ForwardContext, residual: Tensor | None = None) -> Tensor:
        """[B, D, T] -> [B, hidden, T], added to `residual`."""
        if self.output_proj is not None:
            return context.ops.causal_conv1d(quantized, self.output_proj.weight, residual=residual)
        return quantized if residual is None else residual + quantized

    def encode(self, latents: Tensor, levels: int, context: ForwardContext) -> Tensor:
        """[B, hidden, T] -> [B, levels, T] int64."""
        return self._search(self.project(latents, context), levels, context)

    def _search(self, projected: Tensor, levels: int, context: ForwardContext) -> Tensor:
        codebooks = self.codebooks(levels)
        rows = projected.transpose(1, 2).flatten(0, 1)  # [B * T, D]
        codes = context.ops.rvq_encode(rows, codebooks)
        return codes.unflatten(1, (projected.shape[0], -1)).transpose(0, 1)

    def entries(self, codes: Tensor, dtype: torch.dtype, context: ForwardContext) -> Tensor:
        """[B, L, T] -> the sum of the entries [B, D, T]."""
        codebooks = self.codebooks(codes.shape[1])
        total = context.ops.rvq_decode(codes.transpose(0, 1).flatten(1), codebooks, dtype=dtype)  # [B * T, D]
        return total.unflatten(0, (codes.shape[0], -1)).transpose(1, 2)

    def decode(
        self, codes: Tensor, dtype: torch.dtype, context: ForwardContext, residual: Tensor | None = None
    ) -> Tensor:
        """[B, L, T] -> latents [B, hidden, T], added to `residual`."""
        return self.unproject(self.entries(codes, dtype, context), context, residual)

    def straight_through(self, latents: Tensor, levels: int, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Codes and decoded latents with the straight-through gradient (arXiv 1711.00937, section 3.2)."""
        projected = self.project(latents, context)
        codes = self._search(projected.detach(), levels, context)
        quantized = self.entries(codes, latents.dtype, context) + (projected - projected.detach())
        return codes, self.unproject(quantized, context)


class MimiResidualQuantizer(ResidualQuantizer):
    """Entries as the running sums of training; peer: `MimiResidualVectorQuantizer`."""

    def __init__(self, config: MimiCodecConfig, levels: int):
        super().__init__()
        self.layers = nn.ModuleList(Level(config) for _ in range(levels))
        width = config.vector_quantization_hidden_dimension
        if width != config.hidden_size:
            self.input_proj = nn.Conv1d(config.hidden_size, width, 1, bias=False)
            self.output_proj = nn.Conv1d(width, config.hidden_size, 1, bias=False)

    def __len__(self) -> int:
        return len(self.layers)

    def _stored(self) -> tuple[Tensor, ...]:
        books: list[Any] = [level.codebook for level in self.layers]
        return tuple(t for book in books for t in (book.embed_sum, book.cluster_usage))

    def _entries(self, *stored: Tensor) -> Tensor:
        return torch.stack([centroids(*level) for level in zip(stored[::2], stored[1::2], strict=True)])

    def usage(self) -> Tensor:
        return torch.stack([usage.float() for usage in self._stored()[1::2]])

    @torch.no_grad()
    def learned(self, sums: Tensor, usage: Tensor) -> None:
        stored = self._stored()
        for level, (total, count) in enumerate(zip(stored[::2], stored[1::2], strict=True)):
            total.copy_(sums[level])
            count.copy_(usage[level])


class SplitQuantizer(nn.Module):
    """Semantic and acoustic quantizers side by side on the same latents, summed; peer names kept."""

    def __init__(self, semantic: ResidualQuantizer, acoustic: ResidualQuantizer):
        super().__init__()
        self.semantic_residual_vector_quantizer = semantic
        self.acoustic_residual_vector_quantizer = acoustic

    @classmethod
    def of(cls, config: MimiCodecConfig) -> SplitQuantizer:
        """Mimi's, with PyTorch's initial weights."""
        levels = config.num_semantic_quantizers, config.num_quantizers - config.num_semantic_quantizers
        return cls(*(MimiResidualQuantizer(config, count) for count in levels))

    def parts(self, levels: int) -> list[tuple[ResidualQuantizer, int]]:
        """The quantizers that `levels` codebooks use, and how many levels of each."""
        semantic = len(self.semantic_residual_vector_quantizer)
        parts = [(self.semantic_residual_vector_quantizer, semantic)]
        if levels > semantic:
            parts.append((self.acoustic_residual_vector_quantizer, levels - semantic))
        return parts

    def encode(self, latents: Tensor, levels: int, context: ForwardContext) -> list[Tensor]:
        """[B, hidden, T] -> codes of the semantic levels and of the acoustic ones, each [B, L, T] int64."""
        return [part.encode(latents, count, context) for part, count in self.parts(levels)]

    def decode(self, codes: Tensor, dtype: torch.dtype, context: ForwardContext) -> Tensor:
        """[B, levels, T] -> latents [B, hidden, T]."""
        parts = self.parts(codes.shape[1])
        pieces = codes.split([count for _, count in parts], dim=1)
        latents = None
        for (part, _), piece in zip(parts, pieces, strict=True):
            latents = part.decode(piece, dtype, context, latents)
        assert latents is not None
        return latents

    def straight_through(self, latents: Tensor, levels: int, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """[B, hidden, T] -> codes [B, levels, T] and latents [B, hidden, T], differentiable in the latents."""
        results = [part.straight_through(latents, count, context) for part, count in self.parts(levels)]
        codes = torch.cat([codes for codes, _ in results], dim=1)
        return codes, torch.stack([latent for _, latent in results]).sum(dim=0)
