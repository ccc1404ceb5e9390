"""A codec's API: four transforms, and what users do with them offline, in streams and over ragged batches.

    audio --audio_to_latents--> latents --latents_to_codes--> codes --codes_to_latents--> latents --latents_to_audio-->

A subclass has `encoder`, `decoder` (one may be None) and `quantizer`, lists the modules of each direction, and
implements the first and the last transform. runner.py runs passes that are composed of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime import dispatch, masks
from ..runtime.cpu_graphs import MOST_FRAMES, CpuGraphs
from ..runtime.cuda_graphs import CudaGraphs, GraphReport
from ..runtime.ops import ForwardContext, Ops
from ..runtime.packing import Packable
from ..runtime.ragged import Ragged
from ..runtime.state import DirectionState, StreamState
from ..runtime.tiles import Tiling
from . import checks
from .config import AnyConfig
from .quantizer import SplitQuantizer
from .runner import Pass


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
        self.tiling = Tiling(config.frame_size, config.latent_stride, config.num_filters)
        self.impl = impl
        wanted = num_codebooks
        self._num_codebooks = config.num_quantizers if wanted is None else checks.codebook_count(wanted, config)
        self._new_graphs(torch.get_default_device().type)

    def parts(self, direction: str) -> list[nn.Module | None]:
        """The modules of a direction, "encode" or "decode", whose layers carry state."""
        raise NotImplementedError

    # The transforms. Each is one pass over x, offline or, with `context.state`, of a chunk of streams

    def audio_to_latents(self, audio: Tensor, context: ForwardContext) -> Tensor:
        """Audio [B, C, N] -> latents [B, hidden, ceil(N / frame_size)]; the state of the context moves on."""
        raise NotImplementedError

    def latents_to_codes(self, latents: Tensor, count: int, context: ForwardContext) -> list[Tensor]:
        """Latents [B, hidden, T] -> codes of the semantic and of the acoustic codebooks, [B, K, T], `count` in all."""
        return self.quantizer.encode(latents, count, context)

    def codes_to_latents(self, codes: Tensor, context: ForwardContext) -> Tensor:
        """Codes [B, K, T] -> latents [B, hidden, T]."""
        return self.quantizer.decode(codes, self.dtype, context)

    def latents_to_audio(self, latents: Tensor, context: ForwardContext) -> Tensor:
        """Latents [B, hidden, T] -> audio [B, C, T * frame_size]; the state of the context moves on."""
        raise NotImplementedError

    def forward_context(
        self, batch: int, state: DirectionState | None = None, lengths: Tensor | None = None
    ) -> ForwardContext:
        """What a pass over a batch carries: the ops bound for this device and dtype, and the state of streams."""
        subtile = self.tiling.positions_per_subtile(batch, self.device, self.dtype)
        return ForwardContext(self.ops, state, lengths, subtile, None if state is None else state.first)

    # The passes that are made of them, for `encode` and the like and for pools of streams (fastmimi/serve)

    def encode_latent_pass(self) -> Pass:
        """Audio [B, C, N] -> latents [B, hidden, T]."""
        return Pass(
            self, "encode", lambda audio, context: [self.audio_to_latents(audio, context)], "latents",
            self.frame_size, 1, self.config.hidden_size, self.dtype,
        )  # fmt: skip

    def encode_pass(self, count: int) -> Pass:
        """Audio [B, C, N] -> codes [B, count, T]."""
        return Pass(
            self, "encode", lambda x, context: self.latents_to_codes(self.audio_to_latents(x, context), count, context),
            count, self.frame_size, 1, count, torch.int64,
        )  # fmt: skip

    def decode_pass(self) -> Pass:
        """Codes [B, K, T] -> audio [B, C, T * frame_size]."""
        return Pass(
            self, "decode", lambda x, context: [self.latents_to_audio(self.codes_to_latents(x, context), context)],
            "codes", 1, self.frame_size, self.config.audio_channels, self.dtype,
        )  # fmt: skip

    def decode_latent_pass(self) -> Pass:
        """Latents [B, hidden, T] -> audio [B, C, T * frame_size]."""
        return Pass(
            self, "decode", lambda latents, context: [self.latents_to_audio(latents, context)], "latents",
            1, self.frame_size, self.config.audio_channels, self.dtype,
        )  # fmt: skip

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packable:
        for graphs in self.graphs.values():  # they reference the weights that are about to be replaced
            graphs.forget()
        super()._apply(fn, recurse)
        self._new_graphs(self.device.type)
        return self

    def _new_graphs(self, device: str) -> None:
        kind = CudaGraphs if device == "cuda" else CpuGraphs
        self.graphs: dict[str, CpuGraphs | CudaGraphs] = {name: kind(name) for name in ("encode", "decode")}

    def _a_parameter(self) -> Tensor:
        half: Any = self.encoder if self.encoder is not None else self.decoder
        return half.layers["0"].conv.weight

    def explain(self) -> list[dispatch.Choice]:
        """For each op what runs on this device and dtype, why, and why the other candidates do not."""
        return dispatch.explain(self.device.type, self.dtype, self.impl)

    @property
    def ops(self) -> Ops:
        """The implementation of each op that is bound for this device and dtype."""
        return dispatch.bind(self.device.type, self.dtype, self.impl)

    # Streams

    def new_state(self, batch_size: int = 1) -> StreamState:
        """The state of `batch_size` fresh streams, both directions, on the model's device and in its dtype.

        Raises InputError where the configuration cannot stream (not causal, mirrored padding) or batch_size < 1.
        """
        checks.streamable(self.config)
        batch_size = checks.batch_size(batch_size)
        with torch.inference_mode(False):  # so that the state can be used inside and outside of inference mode
            shape = (batch_size, self.config.audio_channels, self.frame_size)
            pending = torch.zeros(shape, device=self.device, dtype=self.dtype)
            encode, decode = (self.new_direction(name, batch_size) for name in ("encode", "decode"))
            return StreamState(encode, decode, pending, self.config)

    def new_direction(self, direction: str, batch: int) -> DirectionState:
        """The state of `batch` fresh streams in one direction, "encode" or "decode"."""
        return DirectionState.of(self.parts(direction), batch, self.device, self.dtype)

    @torch.no_grad()
    def warm_up(
        self, state: StreamState, *, frames: int = 1, num_codebooks: int | None = None, latents: bool = False,
        threads: int = 1,
    ) -> None:  # fmt: skip
        """Pack weights and build kernels for streams of this state's batch size now, so that no frame waits for it.

        Chunks of `frames` frames (1 to 4) are also recorded, on a CPU as native calls (runtime/cpu_graphs.py), on a GPU
        as CUDA graphs of this state alone (runtime/cuda_graphs.py, `graph_report`), which makes every frame faster;
        without this call nothing is recorded. A recording is for one batch size, number of frames, number of
        codebooks (or `latents`, for `encode_to_latent` and `decode_latent`) and `torch.set_num_threads`, and is dropped
        when weights change. `threads` is how many threads will step such streams at the same time. The state stays as
        it is.
        """
        self._check_state(checks.is_state(state), state.batch_size, None)
        if frames not in range(1, MOST_FRAMES + 1) or threads < 1:
            raise InputError(f"frames must be from 1 to {MOST_FRAMES} and threads positive, got {frames} and {threads}")
        channels = self.config.hidden_size if latents else self._count(num_codebooks)
        encoding = self.encode_latent_pass() if latents else self.encode_pass(channels)
        decoding = self.decode_latent_pass() if latents else self.decode_pass()
        if self.encoder is not None:
            encoding.warm_up(self.config.audio_channels, frames, state.encode, threads)
        if self.decoder is not None:
            decoding.warm_up(channels, frames, state.decode, threads)

    def graph_report(self) -> list[GraphReport]:
        """The CUDA graphs that `warm_up` has captured, in order, with the memory that each holds."""
        return [row for graphs in self.graphs.values() if isinstance(graphs, CudaGraphs) for row in graphs.report]

    # Audio to codes

    @torch.no_grad()
    def encode(
        self, audio: Tensor, *, state: StreamState | None = None, padding_mask: Tensor | None = None,
        num_codebooks: int | None = None, last_frame: str = "waveform",
    ) -> Tensor:  # fmt: skip
        """Audio [B, channels, N] -> codes [B, K, T] int64.

        Offline, T = ceil(N / frame_size). With `padding_mask` ([B, N], False where padded, on the left or on the right)
        each row's codes are identical to encoding the unpadded row; frames beyond its end are -1 (see `frame_mask`).
        With `state`, N may be anything: whole frames are returned, and the rest waits for the next call or `flush`.
        Rows whose `exec_mask` is False do not advance; where a row has fewer frames than others its codes are -1.
        `last_frame` says how an incomplete last frame is completed offline: "waveform" pads the audio with zeros (like
        moshi, and like `flush`), "layers" pads the input of each layer (like transformers).
        Memory is bounded for any N if the configuration can stream and no gradients are required.
        Raises InputError for a wrong shape, dtype, mask or count, and for NaN or infinite samples. Samples on a GPU are
        not waited for: there, such samples count as 0, offline all codes of their row are -1, and of a stream
        `state.check()` tells.
        """
        to_codes = self.encode_pass(self._count(num_codebooks))
        codes, valid = self._encode(to_codes, audio, state, padding_mask, last_frame)
        return codes if valid is None else torch.where(valid[:, None], codes, -1)

    @torch.no_grad()
    def flush(self, state: StreamState, *, num_codebooks: int | None = None) -> Tensor:
        """Codes [B, K, 1] of the samples that wait for a full frame, padded with zeros; [B, K, 0] if none do.

        This ends the utterance of the active streams; `state.reset` starts the next one.
        """
        checks.has_part(self.encoder, "encoder", "flush")
        self._check_state(checks.is_state(state), state.batch_size, None)
        to_codes = self.encode_pass(self._count(num_codebooks))
        codes, valid = self._encode_streams(to_codes, *state.pop_partial(), state)
        return torch.where(valid[:, None], codes, -1)

    def encode_to_latent(
        self, audio: Tensor, *, state: StreamState | None = None, padding_mask: Tensor | None = None,
        last_frame: str = "waveform",
    ) -> Tensor:  # fmt: skip
        """Audio [B, channels, N] -> latents before quantisation [B, hidden_size, T]; arguments as for `encode`.

        Differentiable offline. Where a row has no frame (`encode`: a code of -1), its latents are 0.
        """
        latents, valid = self._encode(self.encode_latent_pass(), audio, state, padding_mask, last_frame)
        return latents if valid is None else torch.where(valid[:, None], latents, 0)

    @torch.no_grad()
    def quantize(self, latents: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Latents [B, hidden_size, T] -> codes [B, K, T] int64."""
        latents, count = checks.latents(latents, self.config).to(self.dtype), self._count(num_codebooks)
        if latents.shape[-1] == 0:
            return latents.new_empty(len(latents), count, 0, dtype=torch.int64)
        return torch.cat(self.latents_to_codes(latents, count, self.forward_context(len(latents))), dim=1)

    def straight_through(
        self, audio: Tensor, num_codebooks: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Audio -> codes [B, K, T] and quantized latents [B, hidden_size, T], with straight-through gradients."""
        latents = self.encode_to_latent(audio, **options)
        return self.quantizer.straight_through(latents, self._count(num_codebooks), self.forward_context(len(latents)))

    def frame_mask(self, padding_mask: Tensor) -> Tensor:
        """Mask of samples [B, N] -> mask of frames [B, T]: where `encode` with that mask returns codes."""
        return Ragged.of(padding_mask).frames(self.frame_size).mask

    def _count(self, num_codebooks: int | None) -> int:
        return self.num_codebooks if num_codebooks is None else checks.codebook_count(num_codebooks, self.config)

    def _encode(
        self, run: Pass, audio: Tensor, state: StreamState | None, padding_mask: Tensor | None, last_frame: str
    ) -> tuple[Tensor, Tensor | None]:
        """The result of a pass over audio, [B, C, T], and which frames count, [B, T] or [B, 1] (None: all)."""
        checks.has_part(self.encoder, "encoder", "encode")
        checks.last_frame(last_frame)
        audio = checks.audio(audio, self.config).to(self.dtype)
        if state is not None:
            self._check_state(state, audio.shape[0], padding_mask)
            audio, bad = checks.finite(torch.where(state.mask_on(audio.device)[:, None, None], audio, 0))
            state.note_invalid(bad)
            return self._encode_streams(run, *state.push(audio.to(self.device)), state)
        fill = last_frame == "waveform"
        if padding_mask is None:
            audio, bad = checks.finite(audio)
            result = run.whole(audio.to(self.device), fill=fill)
            return result, None if bad is None else ~bad.to(self.device)[:, None]
        audio = audio.to(self.device)
        rows = self._ragged(padding_mask, audio)
        frames = rows.frames(self.frame_size)
        # with zero-filled frames, what follows a row's end equals the padding of the row alone
        lengths = None if fill else rows.lengths
        audio, bad = checks.finite(rows.align(audio))
        valid = frames.mask if bad is None else frames.mask & ~bad[:, None]
        return run.ragged(audio, rows, frames, lengths, fill), valid

    @torch.no_grad()
    def _encode_streams(
        self, run: Pass, audio: Tensor, frames: Tensor | None, state: StreamState
    ) -> tuple[Tensor, Tensor]:
        """The same for whole frames of audio [B, C, T * frame_size], of which row b has `frames[b]` (None: all T)."""
        total = audio.shape[-1] // self.frame_size
        valid = state.exec_mask[:, None].expand(-1, total)
        if frames is not None:
            steps = torch.arange(total, device=audio.device)
            valid = valid & (steps < frames.to(audio.device)[:, None])
        # rows have equally many frames unless masks made them drift apart: one run per distinct number of frames
        bounds = [0, total] if frames is None else sorted({0, *frames.tolist()})
        return run.of_streams(audio, state.encode, valid, bounds), valid

    # Codes to audio

    def decode(self, codes: Tensor, *, state: StreamState | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Codes [B, K, T] of any integer dtype -> audio [B, channels, T * frame_size].

        K may be any number of codebooks from the semantic ones up. With `padding_mask` [B, T] (see `frame_mask`) each
        row's audio is identical to decoding the unpadded row, and 0 where padded. With `state`, T may be anything; rows
        whose `exec_mask` is False do not advance and return 0, whatever their codes.
        Raises InputError for a wrong shape, dtype or mask, and for codes outside [0, codebook_size). Codes that are on
        a GPU are not waited for: there, the nearest code stands in, offline the audio of their row is NaN, and of a
        stream `state.check()` tells.
        """
        codes, ignored = checks.codes(codes, self.config), None
        if state is not None:
            self._check_state(state, codes.shape[0], padding_mask)
            ignored = ~state.mask_on(codes.device)[:, None].expand(-1, codes.shape[-1])
        elif padding_mask is not None:
            ignored = ~masks.as_tensor(padding_mask, "padding_mask").to(codes.device, torch.bool)
        codes, bad = checks.code_range(codes, self.config, ignored)
        audio = self._decode(self.decode_pass(), codes.to(self.device), state, padding_mask)
        if state is not None:
            state.note_invalid(bad)
        elif bad is not None:
            audio = torch.where(bad.to(self.device)[:, None, None], torch.nan, audio)
        return audio

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> latents [B, hidden_size, T]."""
        codes, bad = checks.code_range(checks.codes(codes, self.config), self.config)
        if codes.shape[-1] == 0:
            return codes.new_empty(len(codes), self.config.hidden_size, 0, dtype=self.dtype, device=self.device)
        latents = self.codes_to_latents(codes.to(self.device), self.forward_context(len(codes)))
        return latents if bad is None else torch.where(bad.to(self.device)[:, None, None], torch.nan, latents)

    def decode_latent(self, latents: Tensor, *, state: StreamState | None = None) -> Tensor:
        """Latents [B, hidden_size, T] -> audio [B, channels, T * frame_size]; differentiable offline."""
        latents = checks.latents(latents, self.config).to(self.device, self.dtype)
        return self._decode(self.decode_latent_pass(), latents, state)

    def _decode(
        self, run: Pass, x: Tensor, state: StreamState | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """The result of a pass over codes [B, K, T] or latents [B, hidden, T]: audio [B, C, T * frame_size]."""
        checks.has_part(self.decoder, "decoder", "decode")
        if state is not None:
            self._check_state(state, x.shape[0], padding_mask)
            with torch.no_grad():
                valid = state.exec_mask[:, None].expand(-1, x.shape[-1])
                audio = run.of_streams(x, state.decode, valid, [0, x.shape[-1]])
                return torch.where(state.exec_mask[:, None, None], audio, 0)
        if padding_mask is None:
            return run.whole(x)
        frames = self._ragged(padding_mask, x)
        samples = frames.times(self.frame_size)
        audio = run.ragged(frames.align(x), frames, samples)
        return torch.where(samples.mask[:, None], audio, 0)

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
