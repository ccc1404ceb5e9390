"""Drop-ins for transformers: `MimiModel`, `MimiEncoderModel` and `MimiDecoderModel`, subclasses of transformers' own.

Because they are subclasses, saving, loading, moving, casting and `isinstance` work as with the originals. A
`fastmimi.Mimi` that shares their parameters (binding.py) does the computation. Names and order of arguments and outputs
are those of the installed transformers, 4.57 or newer (naming.py). On the same weights codes and audio equal those of
transformers' classes (the peer), except for these improvements:

- `padding_mask` is respected: the codes and audio of each row are identical to encoding and decoding the row alone;
  the peer ignores the mask;
- streaming takes chunks of any length: the samples of an incomplete frame are kept in the `padding_cache` for the next
  call; the peer drops them;
- `forward` passes gradients through the quantizer to the encoder (straight-through); the peer's stop at the codes;
- long audio is processed in tiles, in bounded memory;
- codebooks stay fp32 in half-precision models.

There is one more difference from transformers 4: offline it attends to all earlier positions, while transformers 5 and
fastmimi attend to a window of 250 positions. Its codes therefore differ beyond 10 s.

An incomplete last frame is padded in each layer, as in the peer. Some requests run on the peer's modules: hidden states
and attentions, the peer's own padding caches, models on several devices, and, with key-value caches, the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mimi import modeling_mimi as peer

from ..errors import InputError
from ..models import checks
from ..models.mimi import Mimi
from ..models.quantizer import apply_in_full_precision, centroids
from ..runtime.dispatch import Impl
from ..runtime.ops import ForwardContext
from ..runtime.packing import Packable, leave_inference_mode
from ..runtime.ragged import Ragged
from .binding import Binding
from .naming import DECODER_CACHE, ENCODER_CACHE, HALVES, as_returned, run_transformer, signature_of

MimiConfig = transformers.MimiConfig


class PaddingCache(peer.MimiConv1dPaddingCache):
    """The streaming state of the convolutions, with the samples of the incomplete frame."""

    def __init__(self, core: Mimi, batch_size: int):
        super().__init__(0, [], [], [])
        self.state = core.new_state(batch_size)


class Codebook(peer.MimiEuclideanCodebook):
    """The peer's codebook, with entries that stay fp32 and are never cached out of date."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        return apply_in_full_precision(self, fn)

    @property
    def embed(self) -> Tensor:
        return centroids(self.embed_sum, self.cluster_usage)


class DropIn(Packable):
    """Base class of the three models. The core is made on first use, and anew after submodules were replaced."""

    config: transformers.MimiConfig
    impl: Impl = "auto"  # which implementation runs each op, see `Codec`

    @classmethod
    @torch.inference_mode(False)  # inference tensors would be packed at every call (runtime/packing.py)
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers' `PreTrainedModel.from_pretrained`."""
        return super().from_pretrained(*args, **options)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # so that transformers converts between its checkpoint layouts for these models too

    def _core(self) -> Mimi:
        binding = self.__dict__.get("_binding")
        if binding is None or not binding.is_current():
            binding = self.__dict__["_binding"] = Binding(self)
        return binding.synced_core(self)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_binding"}  # a copy makes its own

    def _needs_peer(self, kwargs: Mapping[str, object], cache: object = None) -> bool:
        """Whether only the peer's modules can serve the request."""
        if cache is not None and not isinstance(cache, PaddingCache):
            return True  # a cache with one entry per layer: the peer's, or another model's copy of that class
        wants_states = HALVES and any(
            kwargs.get(name) or (kwargs.get(name) is None and getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        return wants_states or len({p.device for p in self.parameters()}) > 1

    def _encode_latents(
        self, core: Mimi, audio: Tensor, past: peer.Cache | None, cache: PaddingCache | None, streaming: bool,
        transformer: Any,
    ) -> tuple[Tensor, peer.Cache | None]:  # fmt: skip
        """Latents [B, hidden, T] and the new key-value cache; the transformer is the peer's."""
        state = None
        audio, _ = checks.finite(checks.audio(audio, core.config).to(core.device, core.dtype))
        if cache is not None:
            audio, _ = cache.state.push(audio)
            state = cache.state.encode
        result = [past]

        def transform(x: Tensor, context: ForwardContext) -> Tensor:
            return run_transformer(transformer, x, result, use_cache=streaming)

        if audio.shape[-1] == 0:
            return audio.new_empty(audio.shape[0], core.config.hidden_size, 0), past
        return core.audio_to_latents(audio, core.forward_context(len(audio), state), transform), result[0]

    def _frames(self, padding_mask: Tensor | None, frames: int) -> Ragged | None:
        """The frames that a mask of samples covers; None if it masks nothing out or has another number of frames."""
        if (padding_mask := _mask_if_padded(padding_mask)) is None:
            return None
        ragged = Ragged.of(padding_mask).frames(self._core().frame_size)
        return ragged if ragged.total == frames else None

    def _decode_latents(
        self, core: Mimi, latents: Tensor, padding_mask: Tensor | None, past: peer.Cache | None, transformer: Any
    ) -> tuple[Tensor, peer.Cache | None]:
        """Audio [B, C, N] of latents [B, hidden, T], trimmed to the mask's length, and the new key-value cache."""
        frames = self._frames(padding_mask, latents.shape[-1])
        result = [past]
        if past is not None or self.config.use_cache:
            context = core.forward_context(len(latents))
            audio = core.latents_to_audio(latents, context, lambda x, context: run_transformer(transformer, x, result))
        else:
            mask = None if frames is None else frames.mask.to(latents.device)
            audio = core._decode(core.decode_latent_pass(), latents, padding_mask=mask)
        if frames is not None and padding_mask is not None:  # move each row's audio to where its mask is set
            samples = Ragged.of(padding_mask.to(audio.device))
            audio = frames.times(core.frame_size).align(audio)
            audio = torch.where(samples.mask[:, None], samples.restore(audio[..., : samples.total]), 0)
        if padding_mask is not None and padding_mask.shape[-1] < audio.shape[-1]:
            audio = audio[..., : padding_mask.shape[-1]]
        return audio, result[0]

    def get_encoded_length(self, input_length: Tensor | int) -> Tensor:
        """Number of frames of codes for `input_length` samples, including an incomplete last frame."""
        return -(-torch.as_tensor(input_length) // self._core().frame_size)


def _mask_if_padded(mask: Tensor | None) -> Tensor | None:
    """The mask, or None if it masks nothing out; when tracing, its values are unknown and it is always returned."""
    return None if mask is None or (not torch.compiler.is_compiling() and mask.bool().all()) else mask


def _delegated(name: str) -> property:
    """A writable property for a submodule of the encoder or the decoder."""
    return property(lambda self: _submodule(self, name), lambda self, module: self._set_submodule(name, module))


class MimiModel(DropIn, peer.MimiModel):
    """Drop-in for `transformers.MimiModel`: see there for the arguments, and the top of this module for differences."""

    def __init__(self, config: transformers.MimiConfig):
        super().__init__(config)
        adopt(self)

    def post_init(self) -> None:  # called again by subclasses
        self._keep_in_fp32_modules_strict = None  # transformers 4 rejects the names of modules with buffers only
        super().post_init()
        self._keep_in_fp32_modules_strict = {"codebook"}

    @signature_of(peer.MimiModel.encode)
    def encode(
        self, input_values: Tensor, padding_mask: Tensor | None = None, num_quantizers: int | None = None,
        past: peer.Cache | None = None, padding_cache: peer.MimiConv1dPaddingCache | None = None,
        use_streaming: bool | None = None, return_dict: bool | None = None, *, extra: dict[str, object],
    ) -> Any:  # fmt: skip
        """Audio [B, channels, N] -> `MimiEncoderOutput` with codes [B, K, ceil(N / frame_size)].

        With `use_streaming`, pass the caches that one call returns to the next; a chunk of any length yields the frames
        that it completes. Codes where a row is masked out are 0, see `get_audio_codes_mask`.
        """
        if self._needs_peer(extra, padding_cache):
            return super().encode(
                input_values, padding_mask, num_quantizers, past, padding_cache, use_streaming,
                return_dict=return_dict, **extra,
            )  # fmt: skip
        core = self._core()
        count = self.config.num_quantizers if num_quantizers is None else num_quantizers
        streaming = self.config.use_streaming if use_streaming is None else use_streaming
        if streaming or past is not None or padding_cache is not None:
            with torch.no_grad():
                if streaming and padding_cache is None:
                    padding_cache = PaddingCache(core, input_values.shape[0])
                transformer = _submodule(self, "encoder_transformer")
                latents, past = self._encode_latents(core, input_values, past, padding_cache, streaming, transformer)
                codes = core.quantize(latents, count)
        else:
            mask = _mask_if_padded(padding_mask)
            codes = core.encode(input_values, padding_mask=mask, num_codebooks=count, last_frame="layers").clamp_(min=0)
        return as_returned(peer.MimiEncoderOutput(codes, past, padding_cache), return_dict, self.config)

    @signature_of(peer.MimiModel.decode)
    def decode(
        self, audio_codes: Tensor, padding_mask: Tensor | None = None, past: peer.Cache | None = None,
        return_dict: bool | None = None, *, extra: dict[str, object],
    ) -> Any:  # fmt: skip
        """Codes [B, K, T] -> `MimiDecoderOutput` with audio [B, channels, T * frame_size], trimmed to the mask."""
        if self._needs_peer(extra):
            return super().decode(audio_codes, padding_mask, past, return_dict=return_dict, **extra)
        core = self._core()
        transformer = _submodule(self, "decoder_transformer")
        latents = core.dequantize(audio_codes)
        audio, past = self._decode_latents(core, latents, padding_mask, past, transformer)
        return as_returned(peer.MimiDecoderOutput(audio, past), return_dict, self.config)

    @signature_of(peer.MimiModel.forward)
    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        audio_codes: Tensor | None = None,
        encoder_past: peer.Cache | None = None,
        decoder_past: peer.Cache | None = None,
        return_dict: bool | None = None,
        *,
        extra: dict[str, object],  # ignored, as in the peer
    ) -> Any:
        """Audio [B, channels, N] -> `MimiOutput` with codes, and audio of the input's length; differentiable."""
        length = (input_values if padding_mask is None else padding_mask).shape[-1]
        no_states = {"output_hidden_states": False, "output_attentions": False}  # `MimiOutput` has no fields for them
        plain = audio_codes is None and encoder_past is None and not self._needs_peer(no_states)
        if plain and torch.is_grad_enabled() and not self.config.use_streaming:
            core = self._core()
            count = self.config.num_quantizers if num_quantizers is None else num_quantizers
            mask = _mask_if_padded(padding_mask)
            audio_codes, latents = core.straight_through(input_values, count, padding_mask=mask, last_frame="layers")
            if mask is not None:
                audio_codes = torch.where(core.frame_mask(mask)[:, None], audio_codes, 0)
            transformer = _submodule(self, "decoder_transformer")
            audio, decoder_past = self._decode_latents(core, latents, padding_mask, decoder_past, transformer)
        else:
            if audio_codes is None:
                encoded = self.encode(input_values, padding_mask, num_quantizers, encoder_past, return_dict=True)
                audio_codes, encoder_past = encoded.audio_codes, getattr(encoded, ENCODER_CACHE)
            decoded = self.decode(audio_codes, padding_mask, decoder_past, return_dict=True)
            audio, decoder_past = decoded.audio_values, getattr(decoded, DECODER_CACHE)
        audio = audio[..., :length]
        return as_returned(peer.MimiOutput(audio_codes, audio, encoder_past, decoder_past), return_dict, self.config)

    if HALVES:  # read-only properties in the peer; here writable, for subclasses that set `self.upsample = None`

        def _set_submodule(self, name: str, value: nn.Module | None) -> None:
            half = self.encoder if name in ("encoder_transformer", "downsample") else self.decoder
            if half is not None:
                setattr(half, name, value)

        encoder_transformer, decoder_transformer = _delegated("encoder_transformer"), _delegated("decoder_transformer")
        downsample, upsample = _delegated("downsample"), _delegated("upsample")

        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(getattr(type(self), name, None), property) and isinstance(value, nn.Module):
                getattr(type(self), name).fset(self, value)  # nn.Module would register it as a submodule of this one
            else:
                super().__setattr__(name, value)


if HALVES:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    class MimiEncoderModel(DropIn, peer.MimiEncoderModel):
        """Drop-in for `transformers.MimiEncoderModel`: audio to continuous latents."""

        @signature_of(peer.MimiEncoderModel.forward)
        def forward(
            self, input_values: Tensor, padding_mask: Tensor | None = None, past: peer.Cache | None = None,
            padding_cache: peer.MimiConv1dPaddingCache | None = None, use_streaming: bool | None = None,
            return_dict: bool | None = None, *, extra: dict[str, object],
        ) -> Any:  # fmt: skip
            """Audio [B, channels, N] -> `MimiEncoderModelOutput` with latents [B, hidden, ceil(N / frame_size)]."""
            if self._needs_peer(extra, padding_cache):
                return super().forward(
                    input_values, padding_mask, past, padding_cache, use_streaming, return_dict=return_dict, **extra
                )
            core = self._core()
            streaming = self.config.use_streaming if use_streaming is None else use_streaming
            if streaming or past is not None or padding_cache is not None:
                if streaming and padding_cache is None:
                    padding_cache = PaddingCache(core, input_values.shape[0])
                with torch.set_grad_enabled(torch.is_grad_enabled() and padding_cache is None):
                    latents, past = self._encode_latents(
                        core, input_values, past, padding_cache, streaming, self.encoder_transformer
                    )
            else:
                mask = _mask_if_padded(padding_mask)
                latents = core.encode_to_latent(input_values, padding_mask=mask, last_frame="layers")
            return as_returned(peer.MimiEncoderModelOutput(latents, past, padding_cache), return_dict, self.config)

    class MimiDecoderModel(DropIn, peer.MimiDecoderModel):
        """Drop-in for `transformers.MimiDecoderModel`: continuous latents to audio."""

        @signature_of(peer.MimiDecoderModel.forward)
        def forward(
            self, latents: Tensor, padding_mask: Tensor | None = None, past: peer.Cache | None = None,
            return_dict: bool | None = None, *, extra: dict[str, object],
        ) -> Any:  # fmt: skip
            """Latents [B, hidden_size, T] -> `MimiDecoderOutput` with audio [B, channels, T * frame_size]."""
            if self._needs_peer(extra):
                return super().forward(latents, padding_mask, past, return_dict=return_dict, **extra)
            core = self._core()
            audio, past = self._decode_latents(core, latents, padding_mask, past, self.decoder_transformer)
            return as_returned(peer.MimiDecoderOutput(audio, past), return_dict, self.config)

    for cls in (MimiEncoderModel, MimiDecoderModel):  # transformers does so in __init__, which `adopt` does not call
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)


def __getattr__(name: str) -> NoReturn:
    if name in ("MimiEncoderModel", "MimiDecoderModel"):
        raise AttributeError(
            f"{name} needs a transformers that has it (5.20 or newer), and {transformers.__version__} is installed"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _submodule(model: nn.Module, name: str) -> Any:
    """A submodule of a `MimiModel` by its flat name, in the flat or the nested layout; None if the model lacks it."""
    if name in model._modules:
        return model._modules[name]
    half = model._modules.get("encoder" if name in ("encoder_transformer", "downsample") else "decoder")
    return None if half is None else getattr(half, name)


def register_auto_model() -> None:
    """Make transformers' `AutoModel` build fastmimi's `MimiModel` from a Mimi configuration or checkpoint."""
    # some 5.x versions of `AutoModel.register` ignore transformers' own configurations
    transformers.AutoModel._model_mapping._extra_content[MimiConfig] = MimiModel


PEERS: tuple[type, ...] = (peer.MimiModel, *((peer.MimiEncoderModel, peer.MimiDecoderModel) if HALVES else ()))


def drop_in_for(cls: type) -> type:
    """The fastmimi class that replaces the peer's `cls`."""
    return globals()[cls.__name__]


def adopt(model: nn.Module, choose: Callable[[type], type] = drop_in_for) -> None:
    """Change the class of a model's codebooks, and of its encoder and decoder if they are models, to fastmimi's.

    `choose` maps the peer's class of an encoder or a decoder to its replacement.
    """
    leave_inference_mode(model)
    for module in model.modules():
        if type(module) is peer.MimiEuclideanCodebook:
            module.__class__ = Codebook
        elif module is not model and type(module) in PEERS:
            module.__class__ = choose(type(module))
    for module in model.modules():
        if isinstance(module, DropIn):
            with suppress(InputError):  # which is raised again when the model is used
                module._core()  # bind now, since torch.compile and torch.export cannot trace it
