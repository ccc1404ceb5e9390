"""Model configurations, checked when they are made.

`MimiCodecConfig` has the fields of transformers' `MimiConfig` with the same meaning, so it reads the `config.json` of
any checkpoint, whichever version of transformers wrote it, without importing transformers. A field's annotation is its
type and range (validation.py); constraints between fields are checked here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError, shown
from . import sizes
from . import validation as valid
from .validation import LONGEST_HISTORY, Json, naming, read_json

if TYPE_CHECKING:
    from .continuous import ContinuousMimiConfig

MIMI_TYPES = ("mimi", "mimi_encoder", "mimi_decoder")  # `model_type` in transformers' config.json


@dataclass
class MimiCodecConfig:
    """Architecture of a Mimi-like codec; defaults are Kyutai's Mimi (arXiv 2410.00037, section 3.3).

    Lengths are in samples of `sampling_rate` (Hz); `sliding_window` in positions of the transformers, which run at
    `encodec_frame_rate` (25 Hz), twice the `frame_rate` (12.5 Hz) of the codes.
    """

    sampling_rate: valid.Hertz = 24_000
    audio_channels: valid.Channels = 1
    hidden_size: valid.Width = 512
    num_filters: valid.Width = 64
    num_residual_layers: valid.Layers = 1
    upsampling_ratios: valid.Kernels = field(default_factory=lambda: [8, 6, 5, 4])
    kernel_size: valid.Kernel = 7
    last_kernel_size: valid.Kernel = 3
    residual_kernel_size: valid.Kernel = 3
    dilation_growth_rate: valid.Kernel = 2
    use_causal_conv: bool = True
    pad_mode: valid.PadMode = "constant"
    compress: valid.Width = 2
    trim_right_ratio: valid.Share = 1.0
    codebook_size: valid.Entries = 2048
    codebook_dim: valid.DerivedWidth = 256
    num_quantizers: valid.Levels = 32
    use_conv_shortcut: bool = False
    vector_quantization_hidden_dimension: valid.Width = 256
    num_semantic_quantizers: valid.Levels = 1
    upsample_groups: valid.Width = 512
    num_hidden_layers: valid.Layers = 8
    intermediate_size: valid.Width = 2048
    num_attention_heads: valid.Width = 8
    num_key_value_heads: valid.Width = 8
    head_dim: valid.DerivedWidth = 0  # 0: the heads fill the width
    hidden_act: str = "gelu"
    max_position_embeddings: valid.Positions = 8000
    initializer_range: valid.NotNegative = 0.02
    norm_eps: valid.NotNegative = 1e-5
    rope_parameters: Json = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    sliding_window: valid.Window = 250
    attention_dropout: valid.Dropout = 0.0
    layer_scale_initial_scale: valid.Finite = 0.01
    attention_bias: bool = False
    frame_rate: valid.NotNegative = 0.0  # 0: half the rate of the SEANet latents
    has_encoder: bool = True
    has_decoder: bool = True

    def __post_init__(self) -> None:
        ratios: object = self.upsampling_ratios
        if ratios is None or isinstance(ratios, list | tuple):
            self.upsampling_ratios = list(ratios or [8, 6, 5, 4])
        for name in ("codebook_dim", "head_dim", "frame_rate"):  # transformers writes null for what follows from others
            if getattr(self, name) is None:
                setattr(self, name, 0)
        vars(self).update(valid.check_fields(self))
        valid.check_rope(self.rope_parameters)
        self.codebook_dim = self.codebook_dim or self.hidden_size
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.frame_rate = self.frame_rate or self.sampling_rate / (2 * self.hop_length)
        self._validate()

    def _validate(self) -> None:
        """Check the constraints between fields."""
        if self.num_semantic_quantizers >= self.num_quantizers:
            raise InputError(
                f"num_semantic_quantizers must be below num_quantizers ({self.num_quantizers}), "
                f"got {self.num_semantic_quantizers}"
            )
        if not self.use_causal_conv and self.trim_right_ratio != 1.0:
            raise InputError(
                f"trim_right_ratio other than 1.0 needs causal convolutions, got {self.trim_right_ratio} "
                "with use_causal_conv=False"
            )
        if self.codebook_dim != self.vector_quantization_hidden_dimension:
            raise InputError(
                f"codebook_dim must equal vector_quantization_hidden_dimension "
                f"({self.vector_quantization_hidden_dimension}), got {self.codebook_dim}"
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise InputError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), and head_dim even, got {self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads, "
                f"got {self.num_key_value_heads}"
            )
        if not (self.has_encoder or self.has_decoder):
            raise InputError("a codec needs an encoder, a decoder, or both: both were dropped")
        ratio = self.encodec_frame_rate / self.frame_rate
        if not 1 <= ratio <= LONGEST_HISTORY or ratio != int(ratio):
            raise InputError(
                f"frame_rate must divide the rate of the SEANet latents ({self.encodec_frame_rate} Hz), "
                f"got {self.frame_rate}"
            )
        if ratio > 1 and self.hidden_size % self.upsample_groups:
            raise InputError(
                f"upsample_groups must divide hidden_size ({self.hidden_size}), got {self.upsample_groups}"
            )
        if self.compress > self.num_filters:
            raise InputError(f"compress must be at most num_filters ({self.num_filters}), got {self.compress}")
        if self.residual_kernel_size * self.dilation_growth_rate ** (self.num_residual_layers - 1) > LONGEST_HISTORY:
            raise InputError(
                f"num_residual_layers with dilation_growth_rate={self.dilation_growth_rate} must reach no further back "
                f"than {LONGEST_HISTORY} samples, got {self.num_residual_layers}"
            )
        valid.check_activation(self.hidden_act)
        valid.check_size(self.num_parameters)

    @property
    def hop_length(self) -> int:
        """Samples per SEANet latent (960)."""
        return math.prod(self.upsampling_ratios)

    @property
    def encodec_frame_rate(self) -> int:
        """Rate of the SEANet latents and of both transformers in Hz (25), rounded up as transformers does."""
        return math.ceil(self.sampling_rate / self.hop_length)

    @property
    def latent_stride(self) -> int:
        """SEANet latents per frame of codes: 2, or 1 where nothing is resampled."""
        return int(self.encodec_frame_rate / self.frame_rate)

    @property
    def frame_size(self) -> int:
        """Samples per frame of codes (1920)."""
        return self.hop_length * self.latent_stride

    @property
    def num_parameters(self) -> int:
        """Numbers in the model's state dict (96 million)."""
        return sizes.of_mimi(self)

    @property
    def streamable(self) -> bool:
        """Whether the codec is causal to the sample, so that it streams and long audio runs in tiles."""
        return self.use_causal_conv and self.pad_mode != "reflect" and self.trim_right_ratio == 1.0

    @property
    def not_streamable_because(self) -> str:
        """Why this configuration cannot stream, in one sentence."""
        if not self.use_causal_conv:
            return "this configuration cannot stream: use_causal_conv=False lets every output see the future"
        if self.pad_mode == "reflect":
            return "this configuration cannot stream: pad_mode='reflect' mirrors samples that have not arrived yet"
        return (
            f"this configuration cannot stream: trim_right_ratio={self.trim_right_ratio} makes the decoder look ahead"
        )

    @property
    def summary(self) -> dict[str, str]:
        """A readable summary of the sizes."""
        transformers = f"{self.num_hidden_layers} layers of {self.hidden_size}, {self.num_attention_heads} heads"
        return {
            "convolutions": f"{self.num_filters} filters, ratios {self.upsampling_ratios}",
            "transformers": f"{transformers}, window of {self.sliding_window}",
        }

    @classmethod
    def from_dict(cls, values: Json) -> MimiCodecConfig:
        """Read transformers' `config.json` (4.57 to 5.x) or what `to_dict` gives; unknown fields are left out."""
        values = _fields_of(values)
        if values.get("rope_parameters") is None:
            values.pop("rope_parameters", None)
            if values.get("rope_theta") is not None:  # transformers < 5
                scaling = values.get("rope_scaling") or {}
                if not isinstance(scaling, dict):
                    raise InputError(f"rope_scaling must be a dictionary, got {shown(scaling)}")
                rope_type = scaling.get("rope_type", scaling.get("type", "default"))
                values["rope_parameters"] = {**scaling, "rope_type": rope_type, "rope_theta": values["rope_theta"]}
        if values.get("frame_rate") is None and values.get("_frame_rate") is not None:
            values["frame_rate"] = values["_frame_rate"]
        for half in ("encoder", "decoder"):  # transformers >= 5.20 saves a dropped half as null
            if f"{half}_config" in values and values[f"{half}_config"] is None:
                values[f"has_{half}"] = False
        if values.get("upsampling_ratios") is None:
            values.pop("upsampling_ratios", None)
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_json(cls, path: str | Path) -> MimiCodecConfig:
        """Read a `config.json`. Raises InputError where it is not JSON or describes another model."""
        values = read_json(path)
        if values.get("model_type", "mimi") not in MIMI_TYPES:
            raise InputError(f"{path} describes a {shown(values['model_type'])} model, not Mimi")
        with naming(path):
            return cls.from_dict(values)

    def to_dict(self) -> Json:
        """The dictionary that transformers would write to `config.json`."""
        values = asdict(self)
        for half in ("encoder", "decoder"):
            if not values.pop(f"has_{half}"):
                values[f"{half}_config"] = None
        values["rope_theta"] = self.rope_parameters.get("rope_theta", 10_000.0)  # for transformers < 5
        if self.frame_rate == self.sampling_rate / (2 * self.hop_length):
            del values["frame_rate"]  # derived: transformers 5 accepts it only as a legacy argument
        return {"model_type": "mimi", "architectures": ["MimiModel"], **values}


@dataclass
class JodioTransformerConfig:
    """One of JODIO's transformers: RMSNorm, RoPE, GELU, no biases."""

    hidden_size: valid.Width = 1028
    num_hidden_layers: valid.Layers = 22
    num_attention_heads: valid.Width = 16
    head_dim: valid.Width = 64
    intermediate_size: valid.Width = 4112
    rope_theta: valid.Positive = 10_000.0

    @property
    def rope_parameters(self) -> Json:
        """As Mimi's."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    def __post_init__(self) -> None:
        vars(self).update(valid.check_fields(self))
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even, got {self.head_dim}")


def _jodio_decoder() -> JodioTransformerConfig:
    return JodioTransformerConfig(256, 4, 4, 64, 1024)


@dataclass
class JodioConfig:
    """Architecture of JODIO: Mimi's relative of 896 channels, SiLU and weight norm, without residual units.

    The published module tree cannot run as printed. It is repaired with the smallest possible changes:

    - `post_vq_proj` takes the decoder transformer's 256 features, and stands after it (printed: 6, which nothing has);
    - `quantizer_out_proj`, new, leads from the quantizers' 1028 features to the decoder transformer's 256;
    - convolutions are causal: what is padded on both sides is padded on the left, kernel - 1 times the dilation
      (`input_proj`: 2, printed 1 on either side), and the right is trimmed;
    - transposed convolutions give exactly stride times as many samples, trimmed or completed on the right.

    `as_printed_padding` undoes the last two: paddings and lengths are those of PyTorch for the printed arguments. Such
    a codec sees the future, cannot stream, and gives some frames and samples more or fewer than it was given.

    Lengths are in samples of `sampling_rate` (Hz); `sliding_window` in frames of codes, at whose rate both transformers
    run; `strides` from the audio on, `final_stride` last. Dropout is of attention's weights and of what each half of a
    layer adds, in training. A printed activation after a convolution is part of that convolution's op.
    """

    sampling_rate: valid.Hertz = 24_000
    audio_channels: valid.Channels = 1
    channels: valid.Width = 896
    kernel_size: valid.Kernel = 3
    strides: valid.Kernels = field(default_factory=lambda: [4, 5, 6, 8])
    final_stride: valid.Kernel = 2
    dilations: valid.Kernels = field(default_factory=lambda: [1, 2, 4])
    codebook_size: valid.Entries = 2048
    num_semantic_quantizers: valid.Levels = 2
    num_acoustic_quantizers: valid.Levels = 8
    encoder_transformer: JodioTransformerConfig = field(default_factory=JodioTransformerConfig)
    decoder_transformer: JodioTransformerConfig = field(default_factory=_jodio_decoder)
    sliding_window: valid.Window = 250
    dropout: valid.Dropout = 0.1
    norm_eps: valid.NotNegative = 1e-6
    as_printed_padding: bool = False

    def __post_init__(self) -> None:
        vars(self).update(valid.check_fields(self))
        if self.kernel_size * max(self.dilations) > LONGEST_HISTORY:
            raise InputError(
                f"dilations must reach no further back than {LONGEST_HISTORY} samples, got {self.dilations} "
                f"with kernel_size={self.kernel_size}"
            )
        valid.check_size(self.num_parameters)

    @classmethod
    def small(cls, **changes: Any) -> JodioConfig:
        """A small configuration for tests: all strides, and a width that is no multiple of 8."""
        encoder = JodioTransformerConfig(20, 3, 2, 8, 36)
        decoder = JodioTransformerConfig(12, 2, 3, 4, 24)
        values = {"channels": 8, "codebook_size": 32, "num_acoustic_quantizers": 3, "sliding_window": 6}
        return cls(**{"encoder_transformer": encoder, "decoder_transformer": decoder, **values, **changes})

    @property
    def hidden_size(self) -> int:
        """Width of the latents (1028)."""
        return self.encoder_transformer.hidden_size

    @property
    def num_quantizers(self) -> int:
        """Codebooks (10)."""
        return self.num_semantic_quantizers + self.num_acoustic_quantizers

    @property
    def num_filters(self) -> int:
        """Channels of the layers near the audio."""
        return self.channels

    @property
    def frame_size(self) -> int:
        """Samples per frame of codes (1920)."""
        return math.prod(self.strides) * self.final_stride

    @property
    def frame_rate(self) -> float:
        """Frames per second (12.5)."""
        return self.sampling_rate / self.frame_size

    @property
    def latent_stride(self) -> int:
        """Transformer positions per frame of codes."""
        return 1

    @property
    def num_parameters(self) -> int:
        """Numbers in the model's state dict (386 million)."""
        return sizes.of_jodio(self)

    @property
    def streamable(self) -> bool:
        """Whether the codec is causal to the sample, so that it streams and long audio runs in tiles."""
        return not self.as_printed_padding

    @property
    def not_streamable_because(self) -> str:
        """Why this configuration cannot stream, in one sentence."""
        return "this configuration cannot stream: as_printed_padding=True lets outputs see the future"

    @property
    def summary(self) -> dict[str, str]:
        """A readable summary of the sizes."""
        transformers = ", then ".join(
            f"{part.num_hidden_layers} layers of {part.hidden_size}, {part.num_attention_heads} heads"
            for part in (self.encoder_transformer, self.decoder_transformer)
        )
        return {
            "convolutions": f"{self.channels} channels, strides {[*self.strides, self.final_stride]}",
            "transformers": f"{transformers}; window of {self.sliding_window}",
        }

    @classmethod
    def from_dict(cls, values: Json) -> JodioConfig:
        """Read `to_dict()`; unknown fields are left out."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in _fields_of(values).items() if name in known}
        for half in ("encoder_transformer", "decoder_transformer"):
            if isinstance(values.get(half), dict):
                names = {f.name for f in fields(JodioTransformerConfig)}
                with naming(half):
                    values[half] = JodioTransformerConfig(**{k: v for k, v in values[half].items() if k in names})
        return cls(**values)

    def to_dict(self) -> Json:
        """As it stands in `config.json`."""
        return {"model_type": "jodio", "architectures": ["JodioModel"], **asdict(self)}


AnyConfig: TypeAlias = "MimiCodecConfig | JodioConfig | ContinuousMimiConfig"
CodecConfig = MimiCodecConfig  # its name in fastmimi 0.1


def _fields_of(values: object) -> Json:
    """A copy of what a configuration is read from."""
    if not isinstance(values, dict):
        raise InputError(f"a configuration must be a dictionary of its fields, got {shown(values)}")
    return dict(values)
