"""Mimi: SEANet, transformer and split RVQ (arXiv 2410.00037, section 3.3).

The model owns parameters and calls ops. Kernels are chosen in runtime/dispatch.py, checkpoints are read in
checkpoints/, streams and long audio run in codec.py and runner.py; the drop-ins in compat/ are thin layers over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import dispatch
from ..runtime.ops import ForwardContext
from ..runtime.state import StreamingModule
from . import checks
from .codec import Codec
from .config import AnyConfig, MimiCodecConfig
from .quantizer import SplitQuantizer
from .seanet import CausalConv1d, CausalConvTranspose1d, SeanetDecoder, SeanetEncoder
from .transformer import Transformer

Transform = Callable[[Tensor, ForwardContext], Tensor]  # [B, hidden, T] -> the same


class Mimi(Codec):
    """The codec; by default Kyutai's Mimi: 24 kHz mono to 12.5 Hz frames of up to 32 codes, and back.

    encoder -> encoder transformer (25 Hz) -> downsample (12.5 Hz) -> quantizer -> upsample -> decoder transformer ->
    decoder. A half that the configuration drops is None. Arguments as for `Codec`.
    """

    config_class: type[AnyConfig] = MimiCodecConfig
    encoder: SeanetEncoder | None
    encoder_transformer: Transformer | None
    downsample: CausalConv1d | None
    upsample: CausalConvTranspose1d | None
    decoder_transformer: Transformer | None
    decoder: SeanetDecoder | None

    @torch.inference_mode(False)  # inference tensors could not be packed once (runtime/packing.py)
    def __init__(
        self, config: AnyConfig | None = None, *, impl: dispatch.Impl = "auto", num_codebooks: int | None = None
    ):
        known = checks.config(config, self.config_class)
        super().__init__(known, impl, num_codebooks)
        self._build(known)
        StreamingModule.set_names(self)

    def _build(self, config: Any) -> None:
        """Make the modules of a configuration of this class."""
        halves: list[Any] = [config if has_half else None for has_half in (config.has_encoder, config.has_decoder)]
        self._build_halves(*halves, encoded_size=config.hidden_size)
        self.quantizer = SplitQuantizer.of(config)

    def _build_halves(
        self, encoder: MimiCodecConfig | None, decoder: MimiCodecConfig | None, *, encoded_size: int
    ) -> None:
        """Make the modules of both directions, None where there is no such half.

        encoded_size: channels of the encoder's latents, where they are resampled.
        """
        self.encoder = self.encoder_transformer = self.downsample = None
        self.decoder = self.decoder_transformer = self.upsample = None
        if encoder is not None:
            self.encoder, self.encoder_transformer = SeanetEncoder(encoder), Transformer(encoder)
            if (stride := encoder.latent_stride) > 1:
                self.downsample = CausalConv1d(
                    encoder, (encoder.hidden_size, encoded_size), 2 * stride, stride=stride, bias=False,
                    pad_mode="replicate", samples=encoder.hop_length,
                )  # fmt: skip
        if decoder is not None:
            if (stride := decoder.latent_stride) > 1:
                width = decoder.hidden_size
                self.upsample = CausalConvTranspose1d(
                    decoder, (width, width), stride, groups=decoder.upsample_groups, bias=False
                )
            self.decoder_transformer, self.decoder = Transformer(decoder), SeanetDecoder(decoder)

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
