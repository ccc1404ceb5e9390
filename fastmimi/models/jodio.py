"""JODIO, a wider and deeper relative of Mimi built from the same ops (see `JodioConfig` for its origin).

Modules have the names, classes and arguments of the published module tree. They own parameters; the ops compute, and
streaming is shared with Mimi (seanet.py, transformer.py, quantizer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ..errors import InputError
from ..runtime import dispatch
from ..runtime.ops import ForwardContext
from ..runtime.quantized import scales_of
from ..runtime.ragged import Ragged
from ..runtime.state import StreamingModule
from . import checks, transformer
from .codec import Codec
from .config import JodioConfig, JodioTransformerConfig
from .quantizer import EPSILON, ResidualQuantizer, SplitQuantizer
from .seanet import Surroundings, upsample


class Conv1d(StreamingModule, nn.Conv1d):
    """A convolution of the tree, causal unless `config.as_printed_padding`: [B, C_in, T] -> [B, C_out, T / stride]."""

    def __init__(
        self, config: JodioConfig, channels: tuple[int, int], *, stride: int = 1, dilation: int = 1,
        padding: int | None = None, post: str = "none", samples: int = 1,
    ):  # fmt: skip
        causal = (config.kernel_size - 1) * dilation
        printed = causal if padding is None else padding
        super().__init__(*channels, config.kernel_size, stride, padding=printed, dilation=dilation)
        left, right = (printed, printed) if config.as_printed_padding else (causal, 0)
        self.around = Surroundings(left, right, post=post, samples=samples)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, self.around.left, self.in_channels)}

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        return self.around.convolve(self, x, context, self.name)


class ConvTranspose1d(StreamingModule, nn.ConvTranspose1d):
    """A transposed convolution of the tree: [B, C, T] -> [B, C, T * stride]."""

    def __init__(self, config: JodioConfig, stride: int):
        width, kernel = config.channels, config.kernel_size
        beyond = stride - 1
        super().__init__(width, width, kernel, stride, padding=kernel - 1, output_padding=beyond)
        self.trim = (kernel - 1, kernel - 1 - beyond) if config.as_printed_padding else (0, kernel - stride)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (batch, -(-self.kernel_size[0] // self.stride[0]) - 1, self.in_channels)}

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # type: ignore[override]
        return upsample(self, self.trim, x, context, self.name)


def _dilated(config: JodioConfig, dilations: Sequence[int]) -> nn.ModuleList:
    """Convolutions under weight norm, SiLU in each one's op."""
    width = config.channels, config.channels
    return nn.ModuleList(
        nn.Sequential(weight_norm(Conv1d(config, width, dilation=dilation, post="silu")), nn.SiLU())
        for dilation in dilations
    )


def _run(layers: Iterable[nn.Module], x: Tensor, context: ForwardContext) -> Tensor:
    for layer in layers:
        x = layer[0](x, context) if isinstance(layer, nn.Sequential) else layer(x, context)
    return x


class ConvBlock(nn.Module):
    """[B, C, T] -> [B, C, ceil(T / stride)]."""

    def __init__(self, config: JodioConfig, stride: int, samples: int):
        super().__init__()
        self.layers = _dilated(config, config.dilations)
        self.downsample = Conv1d(config, (config.channels, config.channels), stride=stride, samples=samples)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.downsample(_run(self.layers, x, context), context)


class TransposedConvBlock(nn.Module):
    """[B, C, T] -> [B, C, T * stride]."""

    def __init__(self, config: JodioConfig, stride: int):
        super().__init__()
        self.upsample = ConvTranspose1d(config, stride)
        self.layers = _dilated(config, config.dilations[::-1])

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return _run(self.layers, self.upsample(x, context), context)


class SeaNetEncoder(nn.Module):
    """Audio [B, channels, N] -> [B, C, ceil(N / frame_size)]."""

    def __init__(self, config: JodioConfig):
        super().__init__()
        width = config.channels
        centred = (config.kernel_size - 1) // 2  # as printed
        self.input_proj = Conv1d(config, (config.audio_channels, width), padding=centred)
        *samples, hop = accumulate(config.strides, mul, initial=1)  # between two steps of each block's input
        self.conv_blocks = nn.ModuleList(map(partial(ConvBlock, config), config.strides, samples))
        self.final_conv = Conv1d(config, (width, width), stride=config.final_stride, samples=hop)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return _run([self.input_proj, *self.conv_blocks, self.final_conv], x, context)


class SeaNetDecoder(nn.Module):
    """[B, C, T] -> audio [B, channels, T * frame_size]."""

    def __init__(self, config: JodioConfig):
        super().__init__()
        self.initial_upsample = ConvTranspose1d(config, config.final_stride)
        self.conv_blocks = nn.ModuleList(TransposedConvBlock(config, stride) for stride in config.strides[::-1])
        self.final_proj = Conv1d(config, (config.channels, config.audio_channels))

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return _run([self.initial_upsample, *self.conv_blocks, self.final_proj], x, context)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(transformer.Rings, nn.Module):
    """The parameters of self-attention over the last `sliding_window` frames; width -> heads * head_dim -> width."""

    def __init__(self, config: JodioTransformerConfig, whole: JodioConfig):
        super().__init__()
        self.head_dim, self.kv_heads, self.window = config.head_dim, config.num_attention_heads, whole.sliding_window
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(whole.dropout)


class MultiLayerPerception(nn.Module):
    """The parameters width -> intermediate_size -> width."""

    def __init__(self, config: JodioTransformerConfig, whole: JodioConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(whole.dropout)


class TransformerBlock(nn.Module):
    """[B, T, width] -> the same: one op; the modules own its parameters."""

    def __init__(self, config: JodioTransformerConfig, whole: JodioConfig):
        super().__init__()
        self.attention = Attention(config, whole)
        self.feed_forward = MultiLayerPerception(config, whole)
        self.attention_norm = RMSNorm(config.hidden_size, whole.norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, whole.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, float], context: ForwardContext) -> Tensor:
        attn, mlp, norm1, norm2 = self.attention, self.feed_forward, self.attention_norm, self.mlp_norm
        dropout, residual_dropout = (part.dropout.p if self.training else 0.0 for part in (attn, mlp))
        return context.ops.transformer_layer(
            x, norm1.weight, None, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight, attn.out_proj.weight,
            None, norm2.weight, None, mlp.linear1.weight, mlp.linear2.weight, None, rope[0],
            scales=scales_of(attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, mlp.linear1, mlp.linear2),
            window=attn.window,
            eps=norm1.eps, norm="rms", rope_scale=rope[1], dropout=dropout, residual_dropout=residual_dropout,
            **attn.state(context),
        )  # fmt: skip


class Transformer(transformer.Transformer):
    """[B, width, T] -> the same, normalised."""

    def __init__(self, config: JodioTransformerConfig, whole: JodioConfig):
        super().__init__(config, lambda config: TransformerBlock(config, whole))
        self.norm = RMSNorm(config.hidden_size, whole.norm_eps)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.norm(super().forward(x, context).transpose(1, 2)).transpose(1, 2)


class Embedding(nn.Embedding):
    """A codebook's entries [S, D], fp32 in half-precision models too."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding:
        before = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.element_size() < 4:
            exact = before.to(self.weight.device, torch.float32)
            self.weight = nn.Parameter(exact, self.weight.requires_grad)
        return self


class VectorQuantizer(nn.Module):
    """One level."""

    def __init__(self, config: JodioConfig):
        super().__init__()
        self.codebook = Embedding(config.codebook_size, config.hidden_size)


class ResidualVectorQuantizer(ResidualQuantizer):
    """Latents [B, hidden, T] -> codes [B, L, T], in the latents' own space, and back."""

    def __init__(self, config: JodioConfig, levels: int):
        super().__init__()
        self.quantizers = nn.ModuleList(VectorQuantizer(config) for _ in range(levels))

    def __len__(self) -> int:
        return len(self.quantizers)

    def _stored(self) -> tuple[Tensor, ...]:
        levels: list[Any] = [*self.quantizers]
        return tuple(level.codebook.weight for level in levels)

    def _entries(self, *stored: Tensor) -> Tensor:
        return torch.stack(stored)

    def usage(self) -> Tensor:
        return torch.ones(self.codebooks().shape[:2], device=self.codebooks().device)

    @torch.no_grad()
    def learned(self, sums: Tensor, usage: Tensor) -> None:
        for book, entries in zip(self._stored(), sums / usage.clamp(min=EPSILON)[..., None], strict=True):
            book.copy_(entries)


class JodioModel(Codec):
    """The codec: 24 kHz mono to 12.5 Hz frames of up to 10 codes, and back; used as `Mimi` is.

    encoder -> pre_vq_proj -> encoder transformer -> semantic and acoustic RVQ side by side, summed ->
    quantizer_out_proj -> decoder transformer -> post_vq_proj -> decoder. Arguments as for `Codec`. No trained weights
    of it are published.
    """

    encoder: SeaNetEncoder
    decoder: SeaNetDecoder

    @torch.inference_mode(False)  # inference tensors could not be packed once (runtime/packing.py)
    def __init__(
        self, config: JodioConfig | None = None, *, impl: dispatch.Impl = "auto", num_codebooks: int | None = None
    ):
        config = checks.config(config, JodioConfig)
        super().__init__(config, impl, num_codebooks)
        self.config: JodioConfig = config
        before, after = config.encoder_transformer, config.decoder_transformer
        self.encoder = SeaNetEncoder(config)
        self.encoder_transformer = Transformer(before, config)
        self.pre_vq_proj = nn.Linear(config.channels, before.hidden_size)
        self.semantic_rvq = ResidualVectorQuantizer(config, config.num_semantic_quantizers)
        self.acoustic_rvq = ResidualVectorQuantizer(config, config.num_acoustic_quantizers)
        self.quantizer_out_proj = nn.Linear(before.hidden_size, after.hidden_size)
        self.post_vq_proj = nn.Linear(after.hidden_size, config.channels)
        self.decoder_transformer = Transformer(after, config)
        self.decoder = SeaNetDecoder(config)
        StreamingModule.set_names(self)

    @cached_property
    def quantizer(self) -> SplitQuantizer:  # type: ignore[override]
        """Both quantizers as one; not a submodule, since the tree has them under the names above."""
        return SplitQuantizer(self.semantic_rvq, self.acoustic_rvq)

    def _a_parameter(self) -> Tensor:
        return self.pre_vq_proj.weight

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> JodioModel:
        """`fastmimi.load(source, **options)`, where that is a JODIO."""
        from ..checkpoints.weights import load

        model = load(source, **options)
        if not isinstance(model, cls):
            raise InputError(f"{str(source)!r} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """`fastmimi.save_pretrained(self, directory)`: `config.json` and `model.safetensors`."""
        from ..checkpoints.weights import save_pretrained

        save_pretrained(self, directory)

    def _ragged(self, padding_mask: Tensor, x: Tensor) -> Ragged:
        if self.config.as_printed_padding:
            raise InputError("padding_mask needs lengths that are kept, and as_printed_padding=True changes them")
        return super()._ragged(padding_mask, x)

    def parts(self, direction: str) -> list[nn.Module | None]:
        if direction == "encode":
            return [self.encoder, self.pre_vq_proj, self.encoder_transformer]
        return [self.quantizer_out_proj, self.decoder_transformer, self.post_vq_proj, self.decoder]

    def audio_to_latents(self, audio: Tensor, context: ForwardContext) -> Tensor:
        x = _linear(self.pre_vq_proj, self.encoder(audio, context))
        x = self.encoder_transformer(x, context)
        if context.state is not None:
            context.state.advance(x.shape[-1])
        return x

    def latents_to_audio(self, latents: Tensor, context: ForwardContext) -> Tensor:
        x = self.decoder_transformer(_linear(self.quantizer_out_proj, latents), context)
        audio = self.decoder(_linear(self.post_vq_proj, x), context)
        if context.state is not None:
            context.state.advance(latents.shape[-1])
        return audio


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """[B, C, T] -> [B, C_out, T], of x's dtype under autocast too: the ops take what the weights are."""
    return layer(x.transpose(1, 2)).to(x.dtype).transpose(1, 2)
