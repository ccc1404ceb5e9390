"""A codec's API and its machinery: streams, ragged batches, tiles. What computes is the subclass's (model.py).

A subclass holds `encoder`, `decoder` (one may be None) and `quantizer`, lists the parts of each direction, and says how
audio becomes latents and latents audio, in one pass with or without the state of a lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import dispatch, masks, tiles
from ..runtime.cpu_graphs import MOST_FRAMES, Programs, warm_up
from ..runtime.ops import Call, Ops
from ..runtime.packing import Packable
from ..runtime.ragged import Ragged
from ..runtime.state import Lane, StreamState
from . import checks
from .config import AnyConfig
from .quantizer import SplitQuantizer

Transform = Callable[[Tensor, Call], Tensor]  # latents [B, hidden, T] -> the same


class Codec(Packable):
    """Audio [B, channels, N] float at `sample_rate` Hz <-> codes [B, K, T] int64 at `frame_rate` Hz.

    Args:
        config: the architecture.
        impl: which implementation runs each op: "auto", "reference", "triton", "cpu", "onednn", or a dict per op.
        num_codebooks: codebooks that `encode` yields; by default all of them.
    """

    encoder: nn.Module | None
    decoder: nn.Module | None
    quantizer: SplitQuantizer

    def __init__(self, config: AnyConfig, impl: dispatch.Impl = "auto", num_codebooks: int | None = None):
        super().__init__()
        dispatch.check_impl(impl)
        self.config = config
        self._tiling = tiles.Tiling(config.frame_size, config.latent_stride, config.num_filters)
        self.impl = impl
        self.num_codebooks = config.num_quantizers if num_codebooks is None else num_codebooks
        self._programs = {direction: Programs(direction) for direction in ("encode", "decode")}

    def parts(self, direction: str) -> list[nn.Module | None]:
        """The modules of a direction, "encode" or "decode", whose layers carry state."""
        raise NotImplementedError

    def _encode_step(self, audio: Tensor, lane: Lane | None, lengths: Tensor | None = None) -> Tensor:
        """Audio [B, C, N] -> latents [B, hidden, ceil(N / frame_size)], and the lane moves on."""
        raise NotImplementedError

    def _decode_step(self, latents: Tensor, lane: Lane | None) -> Tensor:
        """Latents [B, hidden, T] -> audio [B, C, T * frame_size], and the lane moves on."""
        raise NotImplementedError

    # What the codec is

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sampling_rate

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second (12.5)."""
        return self.config.frame_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame of codes (1920)."""
        return self.config.frame_size

    @property
    def total_codebooks(self) -> int:
        """How many codebooks there are."""
        return self.config.num_quantizers

    @property
    def num_codebooks(self) -> int:
        """How many codebooks `encode` yields."""
        return self._num_codebooks

    @num_codebooks.setter
    def num_codebooks(self, count: int) -> None:
        self._num_codebooks = checks.codebook_count(count, self.config)

    @property
    def device(self) -> torch.device:
        return self._a_parameter().device

    @property
    def dtype(self) -> torch.dtype:
        return self._a_parameter().dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for programs in self._programs.values():  # they hold the weights that are about to go
            programs.forget()
        return super()._apply(fn, recurse)

    def _a_parameter(self) -> Tensor:
        half: Any = self.encoder if self.encoder is not None else self.decoder
        return half.layers["0"].conv.weight

    def explain(self) -> list[dispatch.Choice]:
        """For each op what runs on this device and dtype, why, and why the other candidates do not."""
        return dispatch.explain(self.device.type, self.dtype, self.impl)

    def _ops(self) -> Ops:
        return dispatch.bind(self.device.type, self.dtype, self.impl)

    # Streams

    def new_state(self, batch_size: int = 1) -> StreamState:
        """The state of `batch_size` fresh streams, both directions, on the model's device and in its dtype.

        Raises InputError where the configuration cannot stream (not causal, mirrored padding) or batch_size < 1.
        """
        checks.streamable(self.config)
        batch_size = checks.batch_size(batch_size)
        with torch.inference_mode(False):  # so that the state can be used in and out of inference mode
            shape = (batch_size, self.config.audio_channels, self.frame_size)
            pending = torch.zeros(shape, device=self.device, dtype=self.dtype)
            lanes = self._lane(batch_size, "encode"), self._lane(batch_size, "decode")
            return StreamState(*lanes, pending, self.config)

    def _lane(self, batch: int, direction: str) -> Lane:
        return Lane.of(self.parts(direction), batch, self.device, self.dtype)

    @torch.no_grad()
    def warm_up(
        self, state: StreamState, *, frames: int = 1, num_codebooks: int | None = None, latents: bool = False,
        threads: int = 1,
    ) -> None:  # fmt: skip
        """Pack weights and build kernels now for streams of this state's batch size, so that no frame waits for it.

        On a CPU, steps of `frames` frames (1 to 4) are also recorded (programs.py), which makes every frame faster;
        without this call nothing is recorded. A recording is for one batch size, number of frames, number of codebooks
        (or `latents`, for `encode_to_latent` and `decode_latent`) and `torch.set_num_threads`, and is dropped when
        weights change. `threads` is how many threads will step such streams at the same time. The state stays as it is.
        """
        self._check_state(checks.is_state(state), state.batch_size, None)
        if frames not in range(1, MOST_FRAMES + 1) or threads < 1:
            raise InputError(f"frames must be from 1 to {MOST_FRAMES} and threads positive, got {frames} and {threads}")
        warm_up(self, state, frames, None if latents else self._count(num_codebooks), threads)

    # Audio to codes

    @torch.no_grad()
    def encode(
        self,
        audio: Tensor,
        *,
        state: StreamState | None = None,
        padding_mask: Tensor | None = None,
        num_codebooks: int | None = None,
        last_frame: str = "waveform",
    ) -> Tensor:
        """Audio [B, channels, N] -> codes [B, K, T] int64.

        Offline T = ceil(N / frame_size). With `padding_mask` ([B, N], False where padded, on the left or the right)
        each row's codes are those of the row alone; frames beyond its end hold -1 (see `frame_mask`).
        With `state`, any N: whole frames come out, the rest is held back until the next call or `flush`. Rows whose
        `exec_mask` is False are left alone; where a row has no frame (others had more) its codes are -1.
        `last_frame` says how an incomplete last frame is completed offline: "waveform" pads the audio with zeros (as
        moshi, and as `flush` does), "layers" pads the input of each layer (as transformers).
        Memory is bounded, whatever N, where the configuration can stream and no gradients are asked for.
        Raises InputError for a wrong shape, dtype, mask, count, or samples that are NaN or infinite.
        """
        codes, valid = self._encode(audio, state, padding_mask, last_frame, self._count(num_codebooks))
        return codes if valid is None else torch.where(valid[:, None], codes, -1)

    @torch.no_grad()
    def flush(self, state: StreamState, *, num_codebooks: int | None = None) -> Tensor:
        """Codes [B, K, 1] of the samples held back, completed with zeros; [B, K, 0] where no stream holds any.

        Ends the utterance of the active streams for encoding; `state.reset` begins the next.
        """
        checks.has_part(self.encoder, "encoder", "flush")
        self._check_state(checks.is_state(state), state.batch_size, None)
        codes, valid = self._encode_stream(*state.pop_partial(), state, self._count(num_codebooks))
        return torch.where(valid[:, None], codes, -1)

    def encode_to_latent(
        self,
        audio: Tensor,
        *,
        state: StreamState | None = None,
        padding_mask: Tensor | None = None,
        last_frame: str = "waveform",
    ) -> Tensor:
        """Audio [B, channels, N] -> latents before quantisation [B, hidden_size, T]; arguments as for `encode`.

        Differentiable offline. Where a row has no frame, its latents are 0.
        """
        latents, valid = self._encode(audio, state, padding_mask, last_frame, None)
        return latents if valid is None else torch.where(valid[:, None], latents, 0)

    @torch.no_grad()
    def quantize(self, latents: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Latents [B, hidden_size, T] -> codes [B, K, T] int64."""
        return tiles.joined(
            self._coded(checks.latents(latents, self.config).to(self.dtype), self._count(num_codebooks))
        )

    def straight_through(
        self, audio: Tensor, num_codebooks: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Audio -> codes [B, K, T] and the decoder's latents [B, hidden_size, T]; gradients pass the quantizer."""
        latents = self.encode_to_latent(audio, **options)
        return self.quantizer.straight_through(latents, self._count(num_codebooks), Call(self._ops()))

    def frame_mask(self, padding_mask: Tensor) -> Tensor:
        """Mask of samples [B, N] -> mask of frames [B, T]: where `encode` with that mask puts codes."""
        return Ragged.of(padding_mask).frames(self.frame_size).mask

    def _count(self, num_codebooks: int | None) -> int:
        return self.num_codebooks if num_codebooks is None else checks.codebook_count(num_codebooks, self.config)

    def _coded(self, latents: Tensor, count: int | None) -> list[Tensor]:
        """Latents [B, hidden, T], or with `count` their codes: parts [B, K, T] that add up to [B, count, T]."""
        if count is None or latents.shape[-1] == 0:
            return [latents if count is None else latents.new_empty((len(latents), count, 0), dtype=torch.int64)]
        return self.quantizer.encode(latents, count, Call(self._ops()))

    def _encode(
        self, audio: Tensor, state: StreamState | None, padding_mask: Tensor | None, last_frame: str, count: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents [B, hidden, T], or with `count` codes [B, count, T], and which of them are frames (None: all)."""
        checks.has_part(self.encoder, "encoder", "encode")
        checks.last_frame(last_frame)
        audio = checks.audio(audio, self.config).to(self.device, self.dtype)
        if state is not None:
            self._check_state(state, audio.shape[0], padding_mask)
            audio = checks.finite(torch.where(state.exec_mask[:, None, None], audio, 0))
            return self._encode_stream(*state.push(audio), state, count)
        if padding_mask is None:
            return tiles.joined(self._coded(self._encode_offline(checks.finite(audio), None, last_frame), count)), None
        ragged = self._ragged(padding_mask, audio)
        frames = ragged.frames(self.frame_size)
        audio = checks.finite(ragged.align(audio))
        if self.config.streamable:
            latents = self._encode_offline(audio, ragged.lengths, last_frame)
        else:  # what is beyond a row's end would reach into it: rows of one length go together
            latents = ragged.by_length(audio, lambda rows: self._encode_offline(rows, None, last_frame), frames)
        return tiles.joined(self._coded(frames.restore(latents), count)), frames.mask

    def _encode_offline(self, audio: Tensor, lengths: Tensor | None, last_frame: str) -> Tensor:
        whole = last_frame == "waveform"
        if whole:  # zeros beyond a row's end are what the row alone would be padded with
            lengths = None
        if audio.shape[-1] == 0:
            return audio.new_empty(len(audio), self.config.hidden_size, 0)
        if not self._in_tiles(audio, -(-audio.shape[-1] // self.frame_size)):
            return self._encode_step(tiles.filled(audio, self.frame_size) if whole else audio, None, lengths)
        return self._encode_tiles(audio, self._lane(len(audio), "encode"), lengths, None, whole)

    def _encode_stream(
        self, audio: Tensor, frames: Tensor | None, state: StreamState, count: int | None
    ) -> tuple[Tensor, Tensor]:
        """Whole frames of audio [B, C, T * frame_size], of which row b has `frames[b]` (None: all T)."""
        total = audio.shape[-1] // self.frame_size
        results = [] if total else self._coded(audio.new_empty(audio.shape[0], self.config.hidden_size, 0), count)
        valid = state.exec_mask[:, None].expand(-1, total)
        if frames is not None:
            steps = torch.arange(total, device=audio.device)
            valid = valid & (steps < frames.to(audio.device)[:, None])
        # rows are in step but where masks have made them drift apart: one run for each number of frames
        bounds = [0, total] if frames is None else sorted({0, *frames.tolist()})
        with torch.no_grad():
            for start, stop in pairwise(bounds):
                if stop > start:
                    state.encode.active.copy_(valid[:, start])
                    run = audio[..., start * self.frame_size : stop * self.frame_size]
                    results.append(self._encode_tiles(run, state.encode, None, count))
        return tiles.joined(results, dim=-1), valid

    def _encode_tile(self, audio: Tensor, lane: Lane, count: int | None, inside: Tensor | None = None) -> list[Tensor]:
        return self._coded(self._encode_step(audio, lane, inside), count)

    def _encode_tiles(
        self, audio: Tensor, lane: Lane, lengths: Tensor | None, count: int | None, whole: bool = True
    ) -> Tensor:
        tile = self._tiling.frames_per_tile(len(audio), self.device.type) * self.frame_size

        def parts() -> Iterator[Tensor]:
            for start in range(0, audio.shape[-1], tile):
                part = audio[..., start : start + tile]
                part = tiles.filled(part, self.frame_size) if whole else part
                if lengths is None:
                    found = self._programs["encode"].step(self._ops(), self._encode_tile, part, lane, count)
                else:
                    found = self._encode_tile(part, lane, count, (lengths - start).clamp(0, part.shape[-1]))
                yield tiles.joined(found)

        frames = -(-audio.shape[-1] // self.frame_size)
        return tiles.collected(parts(), frames, tile // self.frame_size)

    # Codes to audio

    def decode(self, codes: Tensor, *, state: StreamState | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Codes [B, K, T] of any integer dtype -> audio [B, channels, T * frame_size].

        K may be any number of codebooks from the semantic ones up. With `padding_mask` [B, T] (see `frame_mask`) each
        row's audio is that of the row alone, and 0 where padded. With `state` any T; rows whose `exec_mask` is False
        are left alone and yield 0, whatever their codes.
        Raises InputError for a wrong shape, dtype or mask, and for codes outside [0, codebook_size).
        """
        codes, ignored = checks.codes(codes, self.config), None
        if state is not None:
            self._check_state(state, codes.shape[0], padding_mask)
            ignored = ~state.exec_mask[:, None].expand(-1, codes.shape[-1])
        elif padding_mask is not None:
            ignored = ~masks.as_tensor(padding_mask, "padding_mask").to(codes.device, torch.bool)
        return self._audio(checks.code_range(codes, self.config, ignored).to(self.device), state, padding_mask)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> latents [B, hidden_size, T]."""
        return self._decoded(checks.code_range(checks.codes(codes, self.config), self.config).to(self.device))

    def _decoded(self, x: Tensor) -> Tensor:
        """Codes [B, K, T], or latents as they are -> latents [B, hidden, T]."""
        if x.is_floating_point():
            return x
        if x.shape[-1] == 0:
            return x.new_empty(x.shape[0], self.config.hidden_size, 0, dtype=self.dtype)
        return self.quantizer.decode(x, self.dtype, Call(self._ops()))

    def decode_latent(self, latents: Tensor, *, state: StreamState | None = None) -> Tensor:
        """Latents [B, hidden_size, T] -> audio [B, channels, T * frame_size]; differentiable offline."""
        return self._audio(checks.latents(latents, self.config).to(self.device, self.dtype), state, None)

    def _audio(self, x: Tensor, state: StreamState | None, padding_mask: Tensor | None) -> Tensor:
        """Codes [B, K, T] or latents [B, hidden, T] -> audio [B, C, T * frame_size]."""
        checks.has_part(self.decoder, "decoder", "decode")
        if state is not None:
            self._check_state(state, x.shape[0], padding_mask)
            with torch.no_grad():
                state.decode.active.copy_(state.exec_mask)
                audio = self._decode_tiles(x, state.decode)
                return torch.where(state.exec_mask[:, None, None], audio, 0)
        if padding_mask is None:
            return self._decode_offline(x)
        frames = self._ragged(padding_mask, x)
        samples = frames.times(self.frame_size)
        x = frames.align(x)
        decode, whole = self._decode_offline, self.config.streamable
        audio = decode(x) if whole else frames.by_length(x, decode, samples)
        return torch.where(samples.mask[:, None], samples.restore(audio), 0)

    def _decode_offline(self, x: Tensor) -> Tensor:
        if x.shape[-1] and not self._in_tiles(x, x.shape[-1]):
            return self._decode_step(self._decoded(x), None)
        return self._decode_tiles(x, self._lane(len(x), "decode"))

    def _decode_tile(self, x: Tensor, lane: Lane) -> list[Tensor]:
        return [self._decode_step(self._decoded(x), lane)]

    def _decode_tiles(self, x: Tensor, lane: Lane) -> Tensor:
        batch, _, frames = x.shape
        audio = x.new_empty(batch, self.config.audio_channels, frames * self.frame_size, dtype=self.dtype)
        tile = self._tiling.frames_per_tile(batch, self.device.type)
        for start in range(0, frames, tile):
            stop = min(start + tile, frames)
            [part] = self._programs["decode"].step(self._ops(), self._decode_tile, x[..., start:stop], lane)
            audio[..., start * self.frame_size : stop * self.frame_size] = part
        return audio

    # Tiles, which equal the whole (tiles.py)

    def _piece(self, batch: int) -> int | None:
        return self._tiling.positions_per_piece(batch, self.device.type)

    def _in_tiles(self, x: Tensor, frames: int) -> bool:
        """Whether an offline input x of so many frames is long enough for tiles, and nothing forbids them."""
        most = self._tiling.most_frames_at_once(x.shape[0], self.device.type)
        if frames <= most or not self.config.streamable:
            return False
        # state is written in place, which autograd cannot differentiate through
        trains = x.requires_grad or any(p.requires_grad for p in self.parameters())
        return not (torch.is_grad_enabled() and trains)

    def _check_state(self, state: StreamState, batch: int, padding_mask: Tensor | None) -> None:
        checks.state(state, (batch, self.config.audio_channels, self.frame_size), self)
        if padding_mask is not None:
            raise InputError("padding_mask is for whole utterances; a stream masks rows with state.exec_mask")

    def _ragged(self, padding_mask: Tensor, x: Tensor) -> Ragged:
        padding_mask = masks.as_tensor(padding_mask, "padding_mask")
        ragged = Ragged.of(padding_mask.to(self.device))
        if (len(ragged.lengths), ragged.total) != (x.shape[0], x.shape[-1]):
            wanted, got = (x.shape[0], x.shape[-1]), tuple(padding_mask.shape)
            raise InputError(f"padding_mask must be {wanted} for an input of {tuple(x.shape)}, got {got}")
        return ragged
