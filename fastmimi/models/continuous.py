"""Mimi with continuous latents in place of codes, as in Pocket TTS: a configuration and what it changes in `Mimi`.

There is no quantizer. The encoder's last layer gives latents of few channels (`encoded_size`), whose statistics a
language model learns; the latents that it generates (`latent_size` channels) are projected to the decoder's width. The
two halves may differ in all but their rates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, shown
from ..runtime import dispatch
from ..runtime.ops import ForwardContext
from . import checks, sizes
from . import validation as valid
from .config import MimiCodecConfig
from .mimi import Mimi, Transform
from .runner import Pass
from .seanet import CausalConv1d
from .validation import Json, naming

SHARED = ("sampling_rate", "audio_channels", "hop_length", "frame_rate")  # by both halves
OF_CODES = (  # fields of a Mimi that say nothing about one of the halves
    "codebook_size", "codebook_dim", "num_quantizers", "vector_quantization_hidden_dimension",
    "num_semantic_quantizers", "has_encoder", "has_decoder",
)  # fmt: skip


def pocket_half(**changes: Any) -> MimiCodecConfig:
    """One half of the Mimi of Pocket TTS, 512 wide; what it says of codebooks has no effect."""
    values: Json = {
        "upsampling_ratios": [6, 5, 4], "num_hidden_layers": 2, "frame_rate": 12.5, "hidden_act": "gelu_pytorch_tanh"
    }  # fmt: skip
    return MimiCodecConfig(**(values | changes))


@dataclass
class ContinuousMimiConfig:
    """Architecture of a Mimi with continuous latents; defaults are those of Pocket TTS (arXiv 2509.06926).

    `encoder` and `decoder` are the configurations of the halves: what a `MimiCodecConfig` says of SEANet, transformer
    and rates. What it says of codebooks has no effect. `encoded_size` and `latent_size` are the channels of the latents
    that the encoder gives and the decoder takes.
    """

    encoder: MimiCodecConfig = field(default_factory=pocket_half)
    decoder: MimiCodecConfig = field(default_factory=pocket_half)
    encoded_size: valid.Width = 32
    latent_size: valid.Width = 32

    def __post_init__(self) -> None:
        vars(self).update(valid.check_fields(self))
        for name in SHARED:
            mine, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if mine != theirs:
                raise InputError(f"encoder and decoder must have the same {name}, got {mine} and {theirs}")
        if self.latent_stride == 1 and self.encoded_size != self.encoder.hidden_size:
            raise InputError(
                f"encoded_size must be the encoder's hidden_size ({self.encoder.hidden_size}) where nothing is "
                f"resampled, got {self.encoded_size}"
            )
        valid.check_size(self.num_parameters)

    @classmethod
    def small(cls, **changes: Any) -> ContinuousMimiConfig:
        """A small configuration for tests, whose halves differ."""
        values: Json = {
            "hidden_size": 32, "num_filters": 4, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 4, "sliding_window": 24, "upsample_groups": 32,
        }  # fmt: skip
        narrow: Json = {"hidden_size": 24, "num_filters": 6, "kernel_size": 3, "num_hidden_layers": 3}
        narrow |= {"upsample_groups": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "sliding_window": 10}
        halves = {"encoder": pocket_half(**values), "decoder": pocket_half(**(values | narrow))}
        return cls(**{**halves, "encoded_size": 6, "latent_size": 8, **changes})

    @property
    def hidden_size(self) -> int:
        """Channels of the latents that the decoder takes (32)."""
        return self.latent_size

    @property
    def sampling_rate(self) -> int:
        """Hz."""
        return self.encoder.sampling_rate

    @property
    def audio_channels(self) -> int:
        """Channels of the audio."""
        return self.encoder.audio_channels

    @property
    def num_filters(self) -> int:
        """Channels of the layers near the audio."""
        return max(self.encoder.num_filters, self.decoder.num_filters)

    @property
    def num_quantizers(self) -> int:
        """Codebooks: none."""
        return 0

    num_semantic_quantizers = codebook_size = num_quantizers

    @property
    def frame_size(self) -> int:
        """Samples per frame of latents (1920)."""
        return self.encoder.frame_size

    @property
    def frame_rate(self) -> float:
        """Frames per second (12.5)."""
        return self.encoder.frame_rate

    @property
    def latent_stride(self) -> int:
        """Transformer positions per frame (16)."""
        return self.encoder.latent_stride

    @property
    def num_parameters(self) -> int:
        """Numbers in the model's state dict (20 million)."""
        return sizes.of_continuous(self)

    @property
    def streamable(self) -> bool:
        """Whether the codec is causal to the sample, so that it streams and long audio runs in tiles."""
        return self.encoder.streamable and self.decoder.streamable

    @property
    def not_streamable_because(self) -> str:
        """Why this configuration cannot stream, in one sentence."""
        return (self.decoder if self.encoder.streamable else self.encoder).not_streamable_because

    @property
    def summary(self) -> dict[str, str]:
        """A readable summary of the sizes."""
        halves = self.encoder.summary, self.decoder.summary
        latents = f"continuous, {self.encoded_size} channels from the encoder, {self.latent_size} to the decoder"
        return {"latents": latents, **{name: ", then ".join(half[name] for half in halves) for name in halves[0]}}

    def half_of(self, name: str) -> MimiCodecConfig:
        """The configuration of the half that the module or parameter of this name belongs to."""
        return self.decoder if name.startswith("decoder") else self.encoder

    @classmethod
    def from_dict(cls, values: Json) -> ContinuousMimiConfig:
        """Read `to_dict()`; unknown fields are left out."""
        if not isinstance(values, dict):
            raise InputError(f"a configuration must be a dictionary of its fields, got {shown(values)}")
        known = {name: values[name] for name in (f.name for f in fields(cls)) if name in values}
        for half in ("encoder", "decoder"):
            if isinstance(known.get(half), dict):
                with naming(half):
                    known[half] = MimiCodecConfig.from_dict(known[half])
        return cls(**known)

    def to_dict(self) -> Json:
        """As it stands in `config.json`."""
        values = asdict(self)
        for half in ("encoder", "decoder"):
            values[half] = {name: value for name, value in values[half].items() if name not in OF_CODES}
        return {"model_type": "mimi_continuous", "architectures": ["ContinuousMimi"], **values}


class ContinuousMimi(Mimi):
    """A Mimi of continuous latents: 24 kHz mono to 12.5 Hz frames of 32 numbers, and back, as in Pocket TTS.

    `encode_to_latent` and `decode_latent`, whole or with `state`, are its API; it has no codes, and whatever needs them
    raises InputError. Streams are recorded by `warm_up(state, latents=True)`. `impl` as for `Codec`.
    """

    config_class = ContinuousMimiConfig
    config: ContinuousMimiConfig
    quantizer: None  # type: ignore[assignment]

    def __init__(self, config: ContinuousMimiConfig | None = None, *, impl: dispatch.Impl = "auto"):
        super().__init__(config, impl=impl)

    def _build(self, config: Any) -> None:
        self._build_halves(config.encoder, config.decoder, encoded_size=config.encoded_size)
        self.quantizer = None
        self.projection = CausalConv1d(config.decoder, (config.latent_size, config.decoder.hidden_size), 1, bias=False)

    def parts(self, direction: str) -> list[nn.Module | None]:
        return [*[self.projection] * (direction == "decode"), *super().parts(direction)]

    def latents_to_audio(
        self, latents: Tensor, context: ForwardContext, transformer: Transform | None = None
    ) -> Tensor:
        return super().latents_to_audio(self.projection(latents, context), context, transformer)

    def encode_latent_pass(self) -> Pass:
        return replace(super().encode_latent_pass(), channels=self.config.encoded_size)

    def _count(self, num_codebooks: int | None) -> int:
        raise checks.no_codes()
