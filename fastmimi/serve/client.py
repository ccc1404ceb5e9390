"""Clients of the server: `Client` for threads, `AsyncClient` for asyncio; both speak /v1/stream and the REST routes.

with Client("http://127.0.0.1:8000") as client, client.stream(num_codebooks=8) as stream:
    for chunk in microphone:
        stream.send_audio(chunk)
        codes = stream.read().codes
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import torch
from torch import Tensor
from websockets.asyncio.client import ClientConnection as AsyncSocket
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection as Socket
from websockets.sync.client import connect

from ..errors import InputError
from . import protocol
from .protocol import Direction, Format, Init, Message, Ready

BOTH: tuple[Direction, ...] = ("encode", "decode")


class ServerError(RuntimeError):
    """The server refused or ended a stream; `code` is the protocol's, or the HTTP status."""

    def __init__(self, code: str | int, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class Results:
    """What came from the server: codes [K, T] int64, audio [channels, N] fp32, and whether a flush is complete."""

    codes: Tensor
    audio: Tensor
    flushed: bool = False


@dataclass
class _Session:
    """What both kinds of streams know: the server's Ready, and results that were not read yet."""

    init: Init
    ready: Ready
    codes: list[Tensor] = field(default_factory=list)
    audio: list[Tensor] = field(default_factory=list)
    flushed: bool = False

    def take(self, message: protocol.FromServer) -> None:
        """Note a message; raises ServerError for an Error."""
        match message:
            case protocol.Codes():
                self.codes.append(protocol.codes_of_bytes(message.codes, message.num_codebooks))
            case protocol.Audio():
                self.audio.append(protocol.samples_of_bytes(message.samples, self.init.format, self.ready.channels))
            case protocol.Flushed():
                self.flushed = True
            case protocol.Error():
                raise ServerError(message.code, message.message)

    def results(self) -> Results:
        codes, audio, flushed = self.codes, self.audio, self.flushed
        self.codes, self.audio, self.flushed = [], [], False
        return Results(
            torch.cat(codes, dim=-1) if codes else torch.zeros(self.ready.num_codebooks, 0, dtype=torch.int64),
            torch.cat(audio, dim=-1) if audio else torch.zeros(self.ready.channels, 0),
            flushed,
        )

    def audio_message(self, audio: Any) -> Message:
        """Samples [N] or [channels, N], float, or int16 where the format is s16."""
        x = torch.as_tensor(np.asarray(audio)) if not isinstance(audio, Tensor) else audio.detach().cpu()
        x = x[None] if x.dim() == 1 else x
        x = x.float() / 32768 if x.dtype == torch.int16 else x.float()
        return protocol.Audio(protocol.samples_to_bytes(x, self.init.format))

    @staticmethod
    def codes_message(codes: Any) -> Message:
        """Codes [K] or [K, T]."""
        x = torch.as_tensor(np.asarray(codes)) if not isinstance(codes, Tensor) else codes.detach().cpu()
        x = x[:, None] if x.dim() == 1 else x
        return protocol.Codes(protocol.codes_to_bytes(x), len(x))


def _init(directions: tuple[Direction, ...], num_codebooks: int | None, rate: int | None, kind: Format) -> Init:
    if kind == "opus":
        raise InputError("this client sends f32 or s16; opus is for clients that have an encoder")
    return Init(directions=directions, num_codebooks=num_codebooks, sample_rate=rate, format=kind)


def _ready(data: str | bytes) -> Ready:
    message = _message(data)
    if isinstance(message, protocol.Error):
        raise ServerError(message.code, message.message)
    if not isinstance(message, Ready):
        raise ServerError("bad_message", f"the server must answer Ready, got {type(message).__name__}")
    return message


def _message(data: str | bytes) -> protocol.FromServer:
    return protocol.from_server(data if isinstance(data, bytes) else data.encode())


class ClientStream:
    """A stream of `Client.stream`. Sending and reading may be done in two threads."""

    def __init__(self, socket: Socket, session: _Session):
        self._socket, self._session = socket, session

    @property
    def ready(self) -> Ready:
        """What the server said at the start: rates, sizes, numbers of codebooks."""
        return self._session.ready

    def send_audio(self, audio: Any) -> None:
        """Samples [N] or [channels, N], of any length."""
        self._send(self._session.audio_message(audio))

    def send_codes(self, codes: Any) -> None:
        """Codes [K] or [K, T]."""
        self._send(self._session.codes_message(codes))

    def flush(self) -> None:
        """Complete the last frame with zeros; when all of its results are there, `read` says `flushed`."""
        self._send(protocol.Flush())

    def reset(self, num_codebooks: int | None = None) -> None:
        """Drop everything and begin anew, with another number of codebooks if one is given."""
        self._send(protocol.Reset(num_codebooks))

    def _send(self, message: Message) -> None:
        try:
            self._socket.send(protocol.pack(message))
        except ConnectionClosed:
            self.read(timeout=0)  # raises what the server said
            raise ServerError("closed", "the server has closed the connection") from None

    def read(self, timeout: float | None = None) -> Results:
        """What has arrived; waits up to `timeout` seconds (None: forever, 0: not at all) if nothing has.

        Raises ServerError if the server ended the stream.
        """
        try:
            while True:
                self._session.take(_message(self._socket.recv(timeout)))
                timeout = 0
        except TimeoutError:
            return self._session.results()
        except ConnectionClosed as error:
            found = self._session.results()
            if found.codes.shape[-1] or found.audio.shape[-1] or found.flushed:
                return found
            raise ServerError("closed", f"the server has closed the connection: {error}") from None

    def read_until_flushed(self) -> Results:
        """All that is left, after `flush`."""
        parts: list[Results] = []
        while not parts or not parts[-1].flushed:
            parts.append(self.read())
        return Results(
            torch.cat([p.codes for p in parts], dim=-1), torch.cat([p.audio for p in parts], dim=-1), flushed=True
        )


class Client:
    """A server at `url` (http or https); `token` as its --token-file has it."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None):
        self.url, self._headers = _base(url), {} if token is None else {"Authorization": f"Bearer {token}"}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextmanager
    def stream(
        self, directions: tuple[Direction, ...] = BOTH, *, num_codebooks: int | None = None,
        sample_rate: int | None = None, format: Format = "f32",
    ) -> Iterator[ClientStream]:  # fmt: skip
        """A stream; `sample_rate` and `format` are those of audio in both directions. Raises ServerError."""
        init = _init(directions, num_codebooks, sample_rate, format)
        with _refusals():
            socket = connect(_ws(self.url), additional_headers=self._headers, compression=None, max_size=None)
        with socket:
            with suppress(ConnectionClosed):  # what the server said before is read next
                socket.send(protocol.pack(init))
            yield ClientStream(socket, _Session(init, _ready(socket.recv())))

    def encode(self, path: str | Path, num_codebooks: int | None = None) -> bytes:
        """An audio file -> the bytes of a token file (`fastmimi.io.tokens`)."""
        query = "" if num_codebooks is None else f"?num_codebooks={num_codebooks}"
        return self._post(f"/v1/encode{query}", Path(path).read_bytes())

    def decode(self, tokens: bytes) -> bytes:
        """The bytes of a token file -> those of a WAV file."""
        return self._post("/v1/decode", tokens)

    def health(self) -> bytes:
        """The server's state, JSON."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/health", headers=self._headers)) as answer:
            return answer.read()

    def _post(self, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(self.url + quote(path, "/?="), body, self._headers, method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(error.code, _said(error.read(), error.code)) from None


class AsyncStream:
    """A stream of `AsyncClient.stream`; see `ClientStream`."""

    def __init__(self, socket: AsyncSocket, session: _Session):
        self._socket, self._session = socket, session

    @property
    def ready(self) -> Ready:
        return self._session.ready

    async def send_audio(self, audio: Any) -> None:
        await self._socket.send(protocol.pack(self._session.audio_message(audio)))

    async def send_codes(self, codes: Any) -> None:
        await self._socket.send(protocol.pack(self._session.codes_message(codes)))

    async def flush(self) -> None:
        await self._socket.send(protocol.pack(protocol.Flush()))

    async def reset(self, num_codebooks: int | None = None) -> None:
        await self._socket.send(protocol.pack(protocol.Reset(num_codebooks)))

    async def send(self, packed: bytes) -> None:
        """A message of `protocol.pack`, for clients that pack theirs in advance."""
        try:
            await self._socket.send(packed)
        except ConnectionClosed as error:
            raise ServerError("closed", f"the server has closed the connection: {error}") from None

    async def receive(self) -> protocol.FromServer:
        """The next message as it is, for clients that need no tensors; raises ServerError."""
        try:
            message = _message(await self._socket.recv())
        except ConnectionClosed as error:
            raise ServerError("closed", f"the server has closed the connection: {error}") from None
        if isinstance(message, protocol.Error):
            raise ServerError(message.code, message.message)
        return message

    async def __aiter__(self) -> AsyncIterator[Results]:
        """Results as they arrive, one message each, until the connection ends; raises ServerError."""
        try:
            async for data in self._socket:
                self._session.take(_message(data))
                yield self._session.results()
        except ConnectionClosed as error:
            raise ServerError("closed", f"the server has closed the connection: {error}") from None


class AsyncClient:
    """`Client` for asyncio; whole files are `Client`'s."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None):
        self.url, self._headers = _base(url), {} if token is None else {"Authorization": f"Bearer {token}"}

    @asynccontextmanager
    async def stream(
        self, directions: tuple[Direction, ...] = BOTH, *, num_codebooks: int | None = None,
        sample_rate: int | None = None, format: Format = "f32",
    ) -> AsyncIterator[AsyncStream]:  # fmt: skip
        """As `Client.stream`."""
        init = _init(directions, num_codebooks, sample_rate, format)
        with _refusals():
            socket = await connect_async(
                _ws(self.url), additional_headers=self._headers, compression=None, max_size=None
            )
        async with socket:
            with suppress(ConnectionClosed):  # what the server said before is read next
                await socket.send(protocol.pack(init))
            yield AsyncStream(socket, _Session(init, _ready(await socket.recv())))


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(f"the server's url must begin with http:// or https://, got {url!r}")
    return url.rstrip("/")


def _ws(url: str) -> str:
    return "ws" + url.removeprefix("http") + "/v1/stream"


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except InvalidStatus as error:
        status = error.response.status_code
        raise ServerError(status, _said(bytes(error.response.body or b""), status)) from None


def _said(body: bytes, status: int) -> str:
    """The server's sentence in an answer."""
    import json

    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"
