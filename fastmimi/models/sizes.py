"""The number of parameters of a configuration by arithmetic, known before anything is allocated.

What is counted is the model's state dict: parameters, and the running sums of codebooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import JodioConfig, JodioTransformerConfig, MimiCodecConfig
    from .continuous import ContinuousMimiConfig


def of_mimi(config: MimiCodecConfig) -> int:
    """Of a Mimi with both halves or one of them."""
    total = _quantizer(config)
    total += _encoder(config, config.hidden_size) if config.has_encoder else 0
    return total + (_decoder(config) if config.has_decoder else 0)


def of_continuous(config: ContinuousMimiConfig) -> int:
    """Of a Mimi with continuous latents."""
    projection = config.latent_size * config.decoder.hidden_size
    return _encoder(config.encoder, config.encoded_size) + projection + _decoder(config.decoder)


def _encoder(config: MimiCodecConfig, encoded_size: int) -> int:
    stride = config.latent_stride
    resampling = config.hidden_size * encoded_size * 2 * stride if stride > 1 else 0
    return _seanet(config, decoder=False) + _transformer(config) + resampling


def _decoder(config: MimiCodecConfig) -> int:
    hidden, stride = config.hidden_size, config.latent_stride
    resampling = hidden * (hidden // config.upsample_groups) * 2 * stride if stride > 1 else 0
    return _seanet(config, decoder=True) + _transformer(config) + resampling


def of_jodio(config: JodioConfig) -> int:
    """Of a JODIO."""
    width, kernel = config.channels, config.kernel_size
    before, after = config.encoder_transformer, config.decoder_transformer
    plain = _conv(width, width, kernel)
    block = len(config.dilations) * (plain + width) + plain  # under weight norm, and the strided one
    ends = _conv(config.audio_channels, width, kernel) + _conv(width, config.audio_channels, kernel) + 2 * plain
    linear = _conv(width, before.hidden_size) + _conv(before.hidden_size, after.hidden_size)
    linear += _conv(after.hidden_size, width)
    return 2 * len(config.strides) * block + ends + linear + _jodio_transformer(before) + _jodio_transformer(after) + (
        config.num_quantizers * config.codebook_size * before.hidden_size
    )  # fmt: skip


def _conv(channels_in: int, channels_out: int, kernel: int = 1) -> int:
    return channels_in * channels_out * kernel + channels_out


def _seanet(config: MimiCodecConfig, *, decoder: bool) -> int:
    def conv(slow: int, fast: int, kernel: int) -> int:
        return _conv(slow, fast, kernel) if decoder else _conv(fast, slow, kernel)

    ratios = config.upsampling_ratios
    width = config.num_filters << len(ratios)
    near_audio, near_latents = config.last_kernel_size, config.kernel_size
    if not decoder:
        near_audio, near_latents = near_latents, near_audio
    total = conv(config.hidden_size, width, near_latents)
    for ratio in ratios:
        total += conv(width, width // 2, 2 * ratio)
        width //= 2
        total += config.num_residual_layers * _resblock(config, width)
    return total + conv(width, config.audio_channels, near_audio)


def _resblock(config: MimiCodecConfig, width: int) -> int:
    inner = width // config.compress
    shortcut = _conv(width, width) if config.use_conv_shortcut else 0
    return _conv(width, inner, config.residual_kernel_size) + _conv(inner, width) + shortcut


def _transformer(config: MimiCodecConfig) -> int:
    hidden = config.hidden_size
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * (wide + narrow + config.intermediate_size) + 6 * hidden  # norms and scales
    biases = wide + 2 * narrow + hidden if config.attention_bias else 0
    return config.num_hidden_layers * (layer + biases)


def _jodio_transformer(config: JodioTransformerConfig) -> int:
    hidden = config.hidden_size
    layer = 2 * hidden * (2 * config.num_attention_heads * config.head_dim + config.intermediate_size) + 2 * hidden
    return config.num_hidden_layers * layer + hidden


def _quantizer(config: MimiCodecConfig) -> int:
    width, size = config.vector_quantization_hidden_dimension, config.codebook_size
    projections = 4 * width * config.hidden_size if width != config.hidden_size else 0
    return config.num_quantizers * (1 + size + size * width) + projections
