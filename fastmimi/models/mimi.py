"""THE model: SEANet, transformer and split RVQ (arXiv 2410.00037, section 3.3).

It owns parameters and calls ops; which kernel runs is dispatch's business, checkpoints are weights', streams and long
audio codec.py's, and the faces of other libraries (compat/) are thin over it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..runtime import dispatch
from ..runtime.ops import Call
from ..runtime.state import Lane
from . import checks
from .codec import Codec, Transform
from .config import CodecConfig
from .quantizer import SplitQuantizer
from .seanet import CausalConv1d, CausalConvTranspose1d, SeanetDecoder, SeanetEncoder, Streaming
from .transformer import Transformer


class Mimi(Codec):
    """The codec; by default Kyutai's Mimi: 24 kHz mono to 12.5 Hz frames of up to 32 codes, and back.

    encoder -> encoder transformer (25 Hz) -> downsample (12.5 Hz) -> quantizer -> upsample -> decoder transformer ->
    decoder. A half that the configuration drops is None. Arguments as for `Codec`.
    """

    @torch.inference_mode(False)  # inference tensors could not be packed once (memory.py)
    def __init__(
        self, config: CodecConfig | None = None, *, impl: dispatch.Impl = "auto", num_codebooks: int | None = None
    ):
        config = checks.config(config, CodecConfig)
        super().__init__(config, impl, num_codebooks)
        hidden, stride = config.hidden_size, config.latent_stride
        self.encoder = SeanetEncoder(config) if config.has_encoder else None
        self.encoder_transformer = Transformer(config) if config.has_encoder else None
        self.downsample = self.upsample = None
        if stride > 1 and config.has_encoder:
            self.downsample = CausalConv1d(
                config, (hidden, hidden), 2 * stride, stride=stride, bias=False, pad_mode="replicate"
            )
        if stride > 1 and config.has_decoder:
            self.upsample = CausalConvTranspose1d(
                config, (hidden, hidden), stride, groups=config.upsample_groups, bias=False
            )
        self.decoder_transformer = Transformer(config) if config.has_decoder else None
        self.decoder = SeanetDecoder(config) if config.has_decoder else None
        self.quantizer = SplitQuantizer(config)
        Streaming.named(self)

    def parts(self, direction: str) -> list[nn.Module | None]:
        if direction == "encode":
            return [self.encoder, self.encoder_transformer, self.downsample]
        return [self.upsample, self.decoder_transformer, self.decoder]

    def _encode_step(
        self, audio: Tensor, lane: Lane | None, lengths: Tensor | None = None, transformer: Transform | None = None
    ) -> Tensor:
        """Audio [B, C, N] -> latents [B, hidden, ceil(N / frame_size)]; a face may bring its own transformer."""
        call = Call(self._ops(), lane, lengths, self._piece(len(audio)))
        assert self.encoder is not None and self.encoder_transformer is not None
        x = (transformer or self.encoder_transformer)(self.encoder(audio, call), call)
        positions = x.shape[-1]
        x = x if self.downsample is None else self.downsample(x, call)
        if lane is not None:
            lane.advance(positions)
        return x

    def _decode_step(self, latents: Tensor, lane: Lane | None, transformer: Transform | None = None) -> Tensor:
        """Latents [B, hidden, T] -> audio [B, C, T * frame_size]; a face may bring its own transformer."""
        call = Call(self._ops(), lane, piece=self._piece(len(latents)))
        assert self.decoder is not None and self.decoder_transformer is not None
        x = latents if self.upsample is None else self.upsample(latents, call)
        positions = x.shape[-1]
        x = self.decoder((transformer or self.decoder_transformer)(x, call), call)
        if lane is not None:
            lane.advance(positions)
        return x
