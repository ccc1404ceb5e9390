"""Mimi: SEANet, transformer and split RVQ (arXiv 2410.00037, section 3.3).

The model owns parameters and calls ops. Kernels are chosen in runtime/dispatch.py, checkpoints are read in
checkpoints/, streams and long audio run in codec.py and runner.py; the drop-ins in compat/ are thin layers over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..runtime import dispatch
from ..runtime.ops import ForwardContext
from ..runtime.state import StreamingModule
from . import checks
from .codec import Codec
from .config import MimiCodecConfig
from .quantizer import SplitQuantizer
from .seanet import CausalConv1d, CausalConvTranspose1d, SeanetDecoder, SeanetEncoder
from .transformer import Transformer

Transform = Callable[[Tensor, ForwardContext], Tensor]  # [B, hidden, T] -> the same


class Mimi(Codec):
    """The codec; by default Kyutai's Mimi: 24 kHz mono to 12.5 Hz frames of up to 32 codes, and back.

    encoder -> encoder transformer (25 Hz) -> downsample (12.5 Hz) -> quantizer -> upsample -> decoder transformer ->
    decoder. A half that the configuration drops is None. Arguments as for `Codec`.
    """

    @torch.inference_mode(False)  # inference tensors could not be packed once (runtime/packing.py)
    def __init__(
        self, config: MimiCodecConfig | None = None, *, impl: dispatch.Impl = "auto", num_codebooks: int | None = None
    ):
        config = checks.config(config, MimiCodecConfig)
        super().__init__(config, impl, num_codebooks)
        hidden, stride = config.hidden_size, config.latent_stride
        self.encoder = SeanetEncoder(config) if config.has_encoder else None
        self.encoder_transformer = Transformer(config) if config.has_encoder else None
        self.downsample = self.upsample = None
        if stride > 1 and config.has_encoder:
            self.downsample = CausalConv1d(
                config, (hidden, hidden), 2 * stride, stride=stride, bias=False, pad_mode="replicate",
                samples=math.prod(config.upsampling_ratios),
            )  # fmt: skip
        if stride > 1 and config.has_decoder:
            self.upsample = CausalConvTranspose1d(
                config, (hidden, hidden), stride, groups=config.upsample_groups, bias=False
            )
        self.decoder_transformer = Transformer(config) if config.has_decoder else None
        self.decoder = SeanetDecoder(config) if config.has_decoder else None
        self.quantizer = SplitQuantizer.of(config)
        StreamingModule.set_names(self)

    def parts(self, direction: str) -> list[nn.Module | None]:
        if direction == "encode":
            return [self.encoder, self.encoder_transformer, self.downsample]
        return [self.upsample, self.decoder_transformer, self.decoder]

    def audio_to_latents(self, audio: Tensor, context: ForwardContext, transformer: Transform | None = None) -> Tensor:
        """Audio [B, C, N] -> latents [B, hidden, ceil(N / frame_size)]; a drop-in may bring its own transformer."""
        assert self.encoder is not None and self.encoder_transformer is not None
        x = (transformer or self.encoder_transformer)(self.encoder(audio, context), context)
        positions = x.shape[-1]
        x = x if self.downsample is None else self.downsample(x, context)
        if context.state is not None:
            context.state.advance(positions)
        return x

    def latents_to_audio(
        self, latents: Tensor, context: ForwardContext, transformer: Transform | None = None
    ) -> Tensor:
        """Latents [B, hidden, T] -> audio [B, C, T * frame_size]; a drop-in may bring its own transformer."""
        assert self.decoder is not None and self.decoder_transformer is not None
        x = latents if self.upsample is None else self.upsample(latents, context)
        positions = x.shape[-1]
        x = self.decoder((transformer or self.decoder_transformer)(x, context), context)
        if context.state is not None:
            context.state.advance(positions)
        return x
