"""The transformers face: `MimiModel` and its halves, drop-in subclasses of transformers' own.

Being subclasses, they are saved, loaded, moved, cast and found by `isinstance` as the originals are; the computing is
`fastmimi.Mimi`'s, bound to the same parameters (binding.py). Arguments and outputs have the names and the order of the
installed transformers, from 4.57 on (naming.py). Codes and audio equal the peer's on the same weights but where it is
improved on:

- `padding_mask` counts: each item's codes and audio are those of the item alone (the peer ignores it);
- streaming takes any chunk: samples that fill no frame yet wait in the `padding_cache` (the peer loses them);
- gradients reach the encoder through `forward`, past the quantizer (straight-through; the peer's stop at the codes);
- long audio runs in tiles, in bounded memory; codebooks stay fp32 in half-precision models.

transformers 4 attends to all that came before, offline, where 5 and we keep the window of 250 positions: beyond 10 s
its codes are others.

An incomplete last frame is padded layer by layer, as the peer does it. What needs the peer's modules runs on them:
hidden states and attentions, key-value caches (its transformer, between our convolutions), its own padding caches, and
models spread over several devices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask
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
from .naming import CACHE, DECODER_CACHE, ENCODER_CACHE, signature_of

MimiConfig = transformers.MimiConfig
HALVES = hasattr(peer, "MimiEncoderModel")  # transformers >= 5.20: encoder and decoder are models of their own


class PaddingCache(peer.MimiConv1dPaddingCache):
    """The convolutions' streaming state, with the samples that fill no frame yet."""

    def __init__(self, core: Mimi, batch_size: int):
        super().__init__(0, [], [], [])
        self.state = core.new_state(batch_size)


class Codebook(peer.MimiEuclideanCodebook):
    """The peer's codebook, whose entries neither lose precision nor go stale."""

    def _apply(self, fn: Any, recurse: bool = True) -> Codebook:
        return apply_in_full_precision(self, fn)

    @property
    def embed(self) -> Tensor:
        return centroids(self.embed_sum, self.cluster_usage)


class Bound(Packable):
    """What the three models share: the core, bound on first use to whatever modules the model has by then."""

    config: Any
    impl: Impl = "auto"  # which implementation runs each op, see `Codec`

    @classmethod
    @torch.inference_mode(False)  # inference tensors could not be packed once (runtime/packing.py)
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers' `PreTrainedModel.from_pretrained`."""
        return super().from_pretrained(*args, **options)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # transformers' conversions between checkpoint layouts are meant for these models too

    def _core(self) -> Mimi:
        binding = self.__dict__.get("_binding")
        if binding is None or not binding.current():
            binding = self.__dict__["_binding"] = Binding(self)
        return binding.follow(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_binding"}  # copies make their own

    def _on_peer(self, kwargs: dict, cache: Any = None) -> bool:
        """Whether the request is one that only the peer's modules can answer."""
        if cache is not None and not isinstance(cache, PaddingCache):
            return True  # a cache of per-layer history, the peer's own or another model's copy of it
        wants_states = HALVES and any(
            kwargs.get(name) or (kwargs.get(name) is None and getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        return wants_states or len({p.device for p in self.parameters()}) > 1

    def _latents_in_steps(
        self, core: Mimi, audio: Tensor, past: Any, cache: PaddingCache | None, streaming: bool, transformer: Any
    ) -> tuple[Tensor, Any]:
        """Latents [B, hidden, T] and the key-value cache, through the peer's transformer."""
        state = None
        audio = checks.finite(checks.audio(audio, core.config).to(core.device, core.dtype))
        if cache is not None:
            audio, _ = cache.state.push(audio)
            state = cache.state.encode
        result = [past]

        def transform(x: Tensor, context: ForwardContext) -> Tensor:
            return _through(transformer, x, result, use_cache=streaming)

        if audio.shape[-1] == 0:
            return audio.new_empty(audio.shape[0], core.config.hidden_size, 0), past
        return core.audio_to_latents(audio, core.forward_context(len(audio), state), transform), result[0]

    def _frames(self, padding_mask: Tensor | None, frames: int) -> Ragged | None:
        """The frames that a mask of samples leaves, if it leaves any out and speaks of these codes."""
        if (padding_mask := _if_it_pads(padding_mask)) is None:
            return None
        ragged = Ragged.of(padding_mask).frames(self._core().frame_size)
        return ragged if ragged.total == frames else None

    def _decoded(self, core: Mimi, latents: Tensor, padding_mask: Tensor | None, past: Any, transformer: Any) -> Any:
        """Audio [B, C, N] of latents [B, hidden, T], cut to the mask's length, and the key-value cache."""
        frames = self._frames(padding_mask, latents.shape[-1])
        result = [past]
        if past is not None or self.config.use_cache:
            context = core.forward_context(len(latents))
            audio = core.latents_to_audio(latents, context, lambda x, context: _through(transformer, x, result))
        else:
            mask = None if frames is None else frames.mask.to(latents.device)
            audio = core._decode(core._latents_to_audio(), latents, padding_mask=mask)
        if frames is not None and padding_mask is not None:  # each item's audio stands where its mask does
            samples = Ragged.of(padding_mask.to(audio.device))
            audio = frames.times(core.frame_size).align(audio)
            audio = torch.where(samples.mask[:, None], samples.restore(audio[..., : samples.total]), 0)
        if padding_mask is not None and padding_mask.shape[-1] < audio.shape[-1]:
            audio = audio[..., : padding_mask.shape[-1]]
        return audio, result[0]

    def get_encoded_length(self, input_length: Tensor | int) -> Tensor:
        """Frames of codes for so many samples, an incomplete last frame counted whole."""
        return -(-torch.as_tensor(input_length) // self._core().frame_size)


def _through(transformer: Any, x: Tensor, past: list[Any], **kwargs: Any) -> Tensor:
    """[B, hidden, T] through the peer's transformer; `past` holds its key-value cache, before and after."""
    x = x.transpose(1, 2)
    if not hasattr(peer, "create_sliding_window_causal_mask"):  # transformers 4 attends to all that came before
        seen = 0 if past[0] is None else past[0].get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)
        kwargs["attention_mask"] = create_sliding_window_causal_mask(transformer.config, x, None, positions, past[0])
    output = transformer(x, return_dict=True, **{CACHE: past[0]}, **kwargs)
    past[0] = getattr(output, CACHE)
    return output.last_hidden_state.transpose(1, 2)


def _if_it_pads(mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it leaves nothing out; traced, its values are not known and it counts."""
    return None if mask is None or (not torch.compiler.is_compiling() and mask.bool().all()) else mask


def _answer(output: Any, return_dict: bool | None, config: Any) -> Any:
    """The output, or the tuple that the installed transformers makes of it."""
    if return_dict if return_dict is not None else config.return_dict:
        return output
    return output.to_tuple() if HALVES else tuple(getattr(output, name) for name in output.__dataclass_fields__)


def _part(name: str) -> property:
    return property(lambda self: _submodule(self, name), lambda self, part: self._set_part(name, part))


class MimiModel(Bound, peer.MimiModel):
    """Drop-in for `transformers.MimiModel`; see there for the arguments, and above for what is better."""

    def __init__(self, config: Any):
        super().__init__(config)
        adopt(self)

    def post_init(self) -> None:  # subclasses call it again
        self._keep_in_fp32_modules_strict = None  # transformers 4 refuses names under which are buffers only
        super().post_init()
        self._keep_in_fp32_modules_strict = {"codebook"}

    @signature_of(peer.MimiModel.encode)
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        past: Any = None,
        padding_cache: Any = None,
        use_streaming: bool | None = None,
        return_dict: bool | None = None,
        *,
        more: dict[str, Any],
    ) -> Any:
        """Audio [B, channels, N] -> `MimiEncoderOutput` with codes [B, K, ceil(N / frame_size)].

        With `use_streaming`, hand the caches of one call to the next; a chunk of any length yields the frames it
        completes. Codes beyond an item's mask are 0: `get_audio_codes_mask` tells which.
        """
        if self._on_peer(more, padding_cache):
            return super().encode(
                input_values, padding_mask, num_quantizers, past, padding_cache, use_streaming,
                return_dict=return_dict, **more,
            )  # fmt: skip
        core = self._core()
        count = self.config.num_quantizers if num_quantizers is None else num_quantizers
        streaming = self.config.use_streaming if use_streaming is None else use_streaming
        if streaming or past is not None or padding_cache is not None:
            with torch.no_grad():
                if streaming and padding_cache is None:
                    padding_cache = PaddingCache(core, input_values.shape[0])
                transformer = _submodule(self, "encoder_transformer")
                latents, past = self._latents_in_steps(core, input_values, past, padding_cache, streaming, transformer)
                codes = core.quantize(latents, count)
        else:
            mask = _if_it_pads(padding_mask)
            codes = core.encode(input_values, padding_mask=mask, num_codebooks=count, last_frame="layers").clamp_(min=0)
        return _answer(peer.MimiEncoderOutput(codes, past, padding_cache), return_dict, self.config)

    @signature_of(peer.MimiModel.decode)
    def decode(
        self,
        audio_codes: Tensor,
        padding_mask: Tensor | None = None,
        past: Any = None,
        return_dict: bool | None = None,
        *,
        more: dict[str, Any],
    ) -> Any:
        """Codes [B, K, T] -> `MimiDecoderOutput` with audio [B, channels, T * frame_size], cut to the mask's length."""
        if self._on_peer(more):
            return super().decode(audio_codes, padding_mask, past, return_dict=return_dict, **more)
        core = self._core()
        transformer = _submodule(self, "decoder_transformer")
        latents = core.dequantize(audio_codes)
        audio, past = self._decoded(core, latents, padding_mask, past, transformer)
        return _answer(peer.MimiDecoderOutput(audio, past), return_dict, self.config)

    @signature_of(peer.MimiModel.forward)
    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        audio_codes: Tensor | None = None,
        encoder_past: Any = None,
        decoder_past: Any = None,
        return_dict: bool | None = None,
        *,
        more: dict[str, Any],  # not looked at, as in the peer
    ) -> Any:
        """Audio [B, channels, N] -> `MimiOutput` with codes and audio of the same length; differentiable end to end."""
        length = (input_values if padding_mask is None else padding_mask).shape[-1]
        no_states = {"output_hidden_states": False, "output_attentions": False}  # `MimiOutput` has no room for them
        plain = audio_codes is None and encoder_past is None and not self._on_peer(no_states)
        if plain and torch.is_grad_enabled() and not self.config.use_streaming:
            core = self._core()
            count = self.config.num_quantizers if num_quantizers is None else num_quantizers
            mask = _if_it_pads(padding_mask)
            audio_codes, latents = core.straight_through(input_values, count, padding_mask=mask, last_frame="layers")
            if mask is not None:
                audio_codes = torch.where(core.frame_mask(mask)[:, None], audio_codes, 0)
            transformer = _submodule(self, "decoder_transformer")
            audio, decoder_past = self._decoded(core, latents, padding_mask, decoder_past, transformer)
        else:
            if audio_codes is None:
                encoded = self.encode(input_values, padding_mask, num_quantizers, encoder_past, return_dict=True)
                audio_codes, encoder_past = encoded.audio_codes, getattr(encoded, ENCODER_CACHE)
            decoded = self.decode(audio_codes, padding_mask, decoder_past, return_dict=True)
            audio, decoder_past = decoded.audio_values, getattr(decoded, DECODER_CACHE)
        audio = audio[..., :length]
        return _answer(peer.MimiOutput(audio_codes, audio, encoder_past, decoder_past), return_dict, self.config)

    if HALVES:  # there read-only properties: subclasses drop parts by `self.upsample = None`

        def _set_part(self, name: str, value: nn.Module | None) -> None:
            half = self.encoder if name in ("encoder_transformer", "downsample") else self.decoder
            if half is not None:
                setattr(half, name, value)

        encoder_transformer, decoder_transformer = _part("encoder_transformer"), _part("decoder_transformer")
        downsample, upsample = _part("downsample"), _part("upsample")

        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(getattr(type(self), name, None), property) and isinstance(value, nn.Module):
                getattr(type(self), name).fset(self, value)  # nn.Module would register it as a child
            else:
                super().__setattr__(name, value)


if HALVES:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    class MimiEncoderModel(Bound, peer.MimiEncoderModel):
        """Drop-in for `transformers.MimiEncoderModel`: audio to continuous latents."""

        @signature_of(peer.MimiEncoderModel.forward)
        def forward(
            self,
            input_values: Tensor,
            padding_mask: Tensor | None = None,
            past: Any = None,
            padding_cache: Any = None,
            use_streaming: bool | None = None,
            return_dict: bool | None = None,
            *,
            more: dict[str, Any],
        ) -> Any:
            """Audio [B, channels, N] -> `MimiEncoderModelOutput` with latents [B, hidden, ceil(N / frame_size)]."""
            if self._on_peer(more, padding_cache):
                return super().forward(
                    input_values, padding_mask, past, padding_cache, use_streaming, return_dict=return_dict, **more
                )
            core = self._core()
            streaming = self.config.use_streaming if use_streaming is None else use_streaming
            if streaming or past is not None or padding_cache is not None:
                if streaming and padding_cache is None:
                    padding_cache = PaddingCache(core, input_values.shape[0])
                with torch.set_grad_enabled(torch.is_grad_enabled() and padding_cache is None):
                    latents, past = self._latents_in_steps(
                        core, input_values, past, padding_cache, streaming, self.encoder_transformer
                    )
            else:
                mask = _if_it_pads(padding_mask)
                latents = core.encode_to_latent(input_values, padding_mask=mask, last_frame="layers")
            return _answer(peer.MimiEncoderModelOutput(latents, past, padding_cache), return_dict, self.config)

    class MimiDecoderModel(Bound, peer.MimiDecoderModel):
        """Drop-in for `transformers.MimiDecoderModel`: continuous latents to audio."""

        @signature_of(peer.MimiDecoderModel.forward)
        def forward(
            self,
            latents: Tensor,
            padding_mask: Tensor | None = None,
            past: Any = None,
            return_dict: bool | None = None,
            *,
            more: dict[str, Any],
        ) -> Any:
            """Latents [B, hidden_size, T] -> `MimiDecoderOutput` with audio [B, channels, T * frame_size]."""
            if self._on_peer(more):
                return super().forward(latents, padding_mask, past, return_dict=return_dict, **more)
            core = self._core()
            audio, past = self._decoded(core, latents, padding_mask, past, self.decoder_transformer)
            return _answer(peer.MimiDecoderOutput(audio, past), return_dict, self.config)

    for cls in (MimiEncoderModel, MimiDecoderModel):  # transformers notes it where one is made; `adopt` makes none
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)


def __getattr__(name: str) -> Any:
    if name in ("MimiEncoderModel", "MimiDecoderModel"):
        raise AttributeError(
            f"{name} needs a transformers that has it (5.20 or newer), and {transformers.__version__} is installed"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _submodule(model: nn.Module, name: str) -> Any:
    """A part of a `MimiModel` by its flat name, in either layout."""
    if name in model._modules:
        return model._modules[name]
    half = model._modules.get("encoder" if name in ("encoder_transformer", "downsample") else "decoder")
    return None if half is None else getattr(half, name)


def register_auto_model() -> None:
    """Make transformers' `AutoModel` build fastmimi's `MimiModel` from a Mimi configuration or checkpoint."""
    # `AutoModel.register` passes over transformers' own configurations in some versions of 5
    transformers.AutoModel._model_mapping._extra_content[MimiConfig] = MimiModel


PEERS: tuple[type, ...] = (peer.MimiModel, *((peer.MimiEncoderModel, peer.MimiDecoderModel) if HALVES else ()))


def ours(cls: type) -> type:
    """The fastmimi model in place of the peer's `cls`."""
    return globals()[cls.__name__]


def adopt(model: nn.Module, choose: Callable[[type], type] = ours) -> None:
    """Give the parts of a model their fastmimi classes: codebooks and, where they are models, its halves."""
    leave_inference_mode(model)
    for module in model.modules():
        if type(module) is peer.MimiEuclideanCodebook:
            module.__class__ = Codebook
        elif module is not model and type(module) in PEERS:
            module.__class__ = choose(type(module))
    for module in model.modules():
        if isinstance(module, Bound):
            with suppress(InputError):  # which comes when it is used
                module._core()  # now, since torch.compile and torch.export cannot trace the binding
