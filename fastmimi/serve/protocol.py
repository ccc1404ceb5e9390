"""The messages of /v1/stream, MessagePack over WebSocket; docs/protocol.md is for those who write a client.

A message is a map whose "type" is the name of its class. Samples are bytes, little-endian, in the format that `Init`
names: of several channels, all samples of the first come first. Codes are bytes of little-endian int16, frame by frame.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, one_line

VERSION = 1
Format: TypeAlias = Literal["f32", "s16", "opus"]
Direction: TypeAlias = Literal["encode", "decode"]
ErrorCode: TypeAlias = Literal["bad_message", "pool_full", "busy", "too_slow", "idle", "draining", "failed"]


class Message(msgspec.Struct, tag_field="type", tag=True, forbid_unknown_fields=True):
    """Base class of all messages."""


class Init(Message, tag=True):
    """The client's first message: what it will send and wants back.

    directions: "encode" turns Audio into Codes, "decode" Codes into Audio. num_codebooks: of the Codes that are sent
    back; by default all that the server encodes. sample_rate: of Audio in both directions, in Hz; by default the
    codec's. format: of Audio in both directions: f32, s16, or opus, chunks of an Ogg Opus stream.
    """

    version: int = VERSION
    directions: tuple[Direction, ...] = ("encode", "decode")
    num_codebooks: int | None = None
    sample_rate: int | None = None
    format: Format = "f32"


class Audio(Message, tag=True):
    """Samples, of any length."""

    samples: bytes


class Codes(Message, tag=True):
    """Frames of codes. num_codebooks: codes per frame, which clients may vary.

    first_frame: the number of the first frame since the start or the last Reset; clients may leave it out.
    """

    codes: bytes
    num_codebooks: int
    first_frame: int = 0


class Flush(Message, tag=True):
    """From the client: complete the last frame with zeros. The server answers with what is left, and Flushed.

    The stream goes on after it, so that the last codes may still be decoded; Reset starts a new one.
    """


class Reset(Message, tag=True):
    """From the client: drop all that waits and start anew. num_codebooks: a new number, if given."""

    num_codebooks: int | None = None


class Ready(Message, tag=True):
    """The server's answer to Init: the codec, and what was agreed on.

    frame_size: samples of a frame at the codec's own rate. max_queued_s: how much input may wait, in seconds of audio.
    """

    version: int
    model: str
    sample_rate: int
    codec_sample_rate: int
    frame_rate: float
    frame_size: int
    channels: int
    num_codebooks: int
    total_codebooks: int
    codebook_size: int
    max_queued_s: float


class Flushed(Message, tag=True):
    """Everything before the client's Flush has been sent."""


class Error(Message, tag=True):
    """What went wrong. `bad_message` leaves the stream as it is; after any other the server closes the connection."""

    code: ErrorCode
    message: str


FromClient: TypeAlias = Init | Audio | Codes | Flush | Reset
FromServer: TypeAlias = Ready | Audio | Codes | Flushed | Error
_encoder = msgspec.msgpack.Encoder()
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_server = msgspec.msgpack.Decoder(FromServer)


def pack(message: Message) -> bytes:
    return _encoder.encode(message)


def from_client(data: bytes) -> FromClient:
    """Raises InputError, in one sentence, for bytes that are no message of a client."""
    return _decoded(data, _from_client)


def from_server(data: bytes) -> FromServer:
    """Raises InputError, in one sentence, for bytes that are no message of a server."""
    return _decoded(data, _from_server)


def _decoded(data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not a message of this protocol: {one_line(error)}") from None


def samples_to_bytes(audio: Tensor, kind: Format) -> bytes:
    """Audio [channels, n] fp32 as f32 or s16."""
    x = audio.numpy()  # PyTorch would round in several threads, which the ticks of a pool need (runtime/openmp.py)
    if kind == "f32":
        return x.astype("<f4", copy=False).tobytes()
    return np.rint(x * np.float32(32768)).clip(-32768, 32767).astype("<i2").tobytes()


def samples_of_bytes(data: bytes, kind: Format, channels: int) -> Tensor:
    """The reverse; raises InputError where the bytes are no whole samples."""
    dtype = np.dtype("<f4" if kind == "f32" else "<i2")
    if len(data) % (dtype.itemsize * channels):
        raise InputError(f"samples must be {channels} x {dtype.itemsize} bytes each, got {len(data)} bytes")
    x = np.frombuffer(data, dtype).reshape(channels, -1)
    return torch.from_numpy(x.astype(np.float32) / (1 if kind == "f32" else 32768))


def codes_to_bytes(codes: Tensor) -> bytes:
    """Codes [K, T]."""
    return codes.t().numpy().astype("<i2").tobytes()


def codes_of_bytes(data: bytes, num_codebooks: int) -> Tensor:
    """Codes [K, T] int64; raises InputError where the bytes are no whole frames."""
    if not 1 <= num_codebooks <= 1 << 10 or len(data) % (2 * num_codebooks):
        raise InputError(f"codes must be 2 x num_codebooks bytes a frame, got {len(data)} bytes for {num_codebooks}")
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int64)).view(-1, num_codebooks).t()
