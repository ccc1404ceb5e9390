"""What is traced: one direction of a codec, over whole audio or as a step of streams, with named inputs and outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime import dispatch
from ..runtime.ops import ForwardContext
from ..runtime.state import DirectionState
from .frozen import FrozenCodec

OFFSET = "offset"  # [B] int64: transformer positions that streams have seen


class Port(NamedTuple):
    """An input or an output; open dimensions have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Direction(nn.Module):
    """Audio [B, C, N] -> codes [B, K, ceil(N / frame_size)], or codes [B, K, T] -> audio [B, C, T * frame_size]."""

    def __init__(self, frozen: FrozenCodec):
        super().__init__()
        self.frozen = frozen

    def run(self, x: Tensor, context: ForwardContext) -> Tensor:
        codec, quantizer = self.frozen.codec, self.frozen.quantizer
        if self.frozen.direction == "decode":
            return codec.latents_to_audio(quantizer.decode(x, torch.float32, context), context)
        frames = (x.shape[-1] + codec.frame_size - 1) // codec.frame_size
        x = F.pad(x, (0, frames * codec.frame_size - x.shape[-1]))  # complete the last frame
        return torch.cat(quantizer.encode(codec.audio_to_latents(x, context), codec.num_codebooks, context), dim=1)

    def ports(self) -> tuple[Port, Port]:
        """Input and output."""
        codec = self.frozen.codec
        count, channels = codec.num_codebooks, codec.config.audio_channels
        if self.frozen.direction == "encode":
            codes = Port("codes", "int64", ("batch", count, "frames"))
            return Port("audio", "float32", ("batch", channels, "samples")), codes
        levels: int | str = count if count == codec.config.num_semantic_quantizers else "codebooks"
        codes = Port("codes", "int64", ("batch", levels, "frames"))
        return codes, Port("audio", "float32", ("batch", channels, "samples"))


class Whole(Direction):
    """Of whole audio."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, ForwardContext(dispatch.exportable()))


class Step(Direction):
    """For the next frames of streams: their state goes in, the new one comes out beside the result."""

    def __init__(self, frozen: FrozenCodec):
        super().__init__(frozen)
        parts = frozen.codec.parts(frozen.direction)
        self.one = DirectionState.of(parts, 1, torch.device("cpu"), torch.float32)  # the state of one stream

    def new_state(self, batch: int) -> dict[str, Tensor]:
        """The state of fresh streams: zeros. Buffers without elements are left out."""
        state = {name: buffer for name, buffer in self.one.buffers.items() if buffer.numel()}
        return {name: tensor.repeat_interleave(batch, 0) for name, tensor in {**state, OFFSET: self.one.offset}.items()}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        held = {name: tensor.clone() for name, tensor in state.items()}  # the ops change them in place
        buffers = {name: held[name] if name in held else self._empty(name, x) for name in self.one.buffers}
        streams = DirectionState(buffers, held[OFFSET], torch.ones_like(held[OFFSET], dtype=torch.bool))
        return self.run(x, ForwardContext(dispatch.exportable(), streams, first=streams.first)), held

    def _empty(self, name: str, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], *self.one.buffers[name].shape[1:])

    def state_ports(self) -> list[Port]:
        """The inputs of the state, in order."""
        state = self.new_state(1)
        return [Port(name, str(t.dtype).removeprefix("torch."), ("batch", *t.shape[1:])) for name, t in state.items()]
