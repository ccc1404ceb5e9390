"""The server's routes: streams over WebSocket, whole files over REST, health, metrics, and the page.

Nothing of what a client sends is a path, a pickle or a URL. Uploads go to a temporary file with a limit.
"""

from __future__ import annotations

import hmac
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import InputError
from . import files, protocol
from .connection import CLOSE_CODES, Connection, ConnectionLimits
from .pool import StreamPool
from .protocol import ErrorCode
from .slots import PoolFull
from .stream import StreamFailed

_log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
SAMPLE = Path(__file__).parents[1] / "assets" / "198-209-0000.ogg"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # so that a new version's modules are not mixed with those of an old one
}


@dataclass(frozen=True)
class Settings:
    """What the server allows. hosts: names that the Host header may have. origins: of pages, besides its own.

    streams_per_client: connections and requests of one address at a time. upload_bytes, upload_s: of a file, and for
    it to arrive. file_s: seconds of audio that it may hold. files_at_once: that are worked on, of all clients.
    """

    model: str = "demo"
    token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
    streams_per_client: int = 64
    upload_bytes: int = 256 << 20
    upload_s: float = 300.0
    file_s: float = 7200.0
    files_at_once: int = 2
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)


class Service:
    """A pool behind the routes. `draining`: no new streams."""

    def __init__(self, pool: StreamPool, settings: Settings):
        self.pool, self.settings, self.draining = pool, settings, False
        self.clients: Counter[str] = Counter()
        self._files = anyio.CapacityLimiter(settings.files_at_once)
        self._static = StaticFiles(directory=PAGE, html=True)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                WebSocketRoute("/v1/stream", self.stream),
                Route("/v1/encode", self.encode, methods=["POST"]),
                Route("/v1/decode", self.decode, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/sample.ogg", self.sample),
                Mount("/", self._page),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.pool.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(self.pool.stop)

    # Who may connect

    def refusal(self, connection: HTTPConnection) -> tuple[int, str] | None:
        """HTTP status and sentence for a client that may not connect; None for others.

        The Host header is checked so that no other site's name can be pointed at this server (DNS rebinding), the
        Origin so that no other site's page can use it with the visitor's access.
        """
        headers, settings = connection.headers, self.settings
        host = _host(f"//{headers.get('host', '')}")
        if settings.hosts and host not in settings.hosts:
            return 403, f"this server is {' or '.join(settings.hosts)}, not {host[:80]!r}"
        origin = headers.get("origin")
        if origin is not None and origin not in settings.origins and origin.partition("://")[2] != headers.get("host"):
            return 403, f"pages of {origin[:80]!r} may not use this server (--allow-origin)"
        if settings.token is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ") or connection.query_params.get("token", "")
            if not hmac.compare_digest(given.encode(), settings.token.encode()):
                return 401, "a token is needed: Authorization: Bearer ..., or ?token=..."
        return None

    @asynccontextmanager
    async def _counted(self, connection: HTTPConnection) -> AsyncIterator[str | None]:
        """Count a stream of this client; yields a sentence if it has too many, or if there are no new ones."""
        client = connection.client.host if connection.client is not None else ""
        if self.draining:
            yield "the server is about to stop"
        elif self.clients[client] >= self.settings.streams_per_client:
            yield f"this client has {self.clients[client]} streams, at most {self.settings.streams_per_client} may run"
        else:
            self.clients[client] += 1
            try:
                yield None
            finally:
                self.clients[client] -= 1
                if not self.clients[client]:
                    del self.clients[client]

    # Routes

    async def stream(self, socket: WebSocket) -> None:
        if (refused := self.refusal(socket)) is not None:
            await socket.send_denial_response(JSONResponse({"error": refused[1]}, refused[0]))
            return
        async with self._counted(socket) as too_many:
            await socket.accept()
            if too_many is not None:
                code: ErrorCode = "draining" if self.draining else "busy"
                with suppress(WebSocketDisconnect):
                    await socket.send_bytes(protocol.pack(protocol.Error(code, too_many)))
                    await socket.close(CLOSE_CODES[code], too_many)
                return
            await Connection(socket, self.pool, self.settings.model, self.settings.connection).run()

    async def encode(self, request: Request) -> Response:
        """An audio file in the body -> a token file; `?num_codebooks=8`, `?format=json`."""

        def work(upload: Path, _: Path) -> Response:
            count = request.query_params.get("num_codebooks")
            if count is not None and not count.isdecimal():
                raise InputError(f"num_codebooks must be a number, got {count[:80]!r}")
            number = None if count is None else int(count)
            tokens = files.encode(self.pool, upload, self.settings.model, number, self.settings.file_s)
            if request.query_params.get("format") == "json":
                fields = {name: value for name, value in vars(tokens).items() if name != "packed"}
                return JSONResponse({**fields, "codes": tokens.codes.tolist()})
            return Response(tokens.to_bytes(), media_type="application/octet-stream")

        return await self._file(request, work)

    async def decode(self, request: Request) -> Response:
        """A token file in the body -> a WAV file."""

        def work(upload: Path, out: Path) -> Response:
            files.decode(self.pool, upload, out, self.settings.file_s)
            return FileResponse(out, media_type="audio/wav")

        return await self._file(request, work)

    async def _file(self, request: Request, work: Callable[[Path, Path], Response]) -> Response:
        """Receive a body into a temporary file and work on it in a thread."""
        if (refused := self.refusal(request)) is not None:
            return JSONResponse({"error": refused[1]}, refused[0])
        async with self._counted(request) as too_many:
            if too_many is not None:
                return JSONResponse({"error": too_many}, 503)
            folder = tempfile.TemporaryDirectory(prefix="fastmimi-")
            try:
                response = await self._worked(request, work, Path(folder.name))
            except BaseException:
                folder.cleanup()
                raise
            response.background = BackgroundTask(folder.cleanup)  # once it has been sent
            return response

    async def _worked(self, request: Request, work: Callable[[Path, Path], Response], folder: Path) -> Response:
        upload, settings, size = folder / "upload", self.settings, 0
        with anyio.move_on_after(settings.upload_s) as scope, upload.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.upload_bytes:
                    return JSONResponse({"error": f"a file may have {settings.upload_bytes} bytes at most"}, 413)
                file.write(chunk)
        if scope.cancelled_caught:
            return JSONResponse({"error": f"a file must arrive within {settings.upload_s:g} s"}, 408)
        try:
            return await anyio.to_thread.run_sync(work, upload, folder / "out.wav", limiter=self._files)
        except InputError as error:
            return JSONResponse({"error": str(error).replace(str(upload), "the file")}, 400)
        except PoolFull as error:
            return JSONResponse({"error": str(error)}, 503)
        except StreamFailed as error:
            return JSONResponse({"error": str(error)}, 500)

    async def health(self, request: Request) -> Response:
        stats = self.pool.stats()
        status = "draining" if self.draining else "ok"
        return JSONResponse(
            {"status": status, "model": self.settings.model, "version": protocol.VERSION} | asdict(stats)
        )

    async def metrics(self, request: Request) -> Response:
        if (refused := self.refusal(request)) is not None:
            return JSONResponse({"error": refused[1]}, refused[0])
        registry = CollectorRegistry()
        registry.register(_Collector(self.pool))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def sample(self, request: Request) -> Response:
        """A clip of speech, which the page plays."""
        return FileResponse(SAMPLE, media_type="audio/ogg")

    async def _page(self, scope: Any, receive: Any, send: Any) -> None:
        """The static files of the page, with headers that keep other content out."""

        async def secured(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in SECURITY.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        if scope["type"] == "http":
            await self._static(scope, receive, secured)
        else:
            await WebSocket(scope, receive, send).close(1008, "streams are at /v1/stream")


def _host(url: str) -> str:
    """The host of a URL; "" for one that has none or is malformed."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class _Collector:
    """The pool's numbers in Prometheus' form."""

    def __init__(self, pool: StreamPool):
        self.pool = pool

    def collect(self) -> list[Any]:
        stats = asdict(self.pool.stats())
        texts = {
            "capacity": "Streams that may be open", "open": "Open streams", "free": "Free slots",
            "quarantined": "Slots that could not be reset", "waiting_frames": "Frames of input that wait",
            "tick_p50_ms": "Median of the last 1,000 ticks", "tick_p99_ms": "99th percentile of the last 1,000 ticks",
            "real_time_factor": "Seconds of audio per second in ticks",
        }  # fmt: skip
        counters = {"encoded_frames": "Frames encoded", "decoded_frames": "Frames decoded",
                    "failed_streams": "Streams lost by failed steps", "ticks": "Ticks that had work"}  # fmt: skip
        return [
            *(GaugeMetricFamily(f"fastmimi_{name}", text, value=stats[name]) for name, text in texts.items()),
            *(CounterMetricFamily(f"fastmimi_{name}", text, value=stats[name]) for name, text in counters.items()),
        ]
