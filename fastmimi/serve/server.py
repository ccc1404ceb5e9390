"""Runs the service: a socket, signals, and the terminal.

On SIGTERM or SIGINT no new streams begin, running ones get `drain_s` seconds to end, and the process exits with 0; a
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from rich.console import Console
from rich.live import Live
from rich.table import Table
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..errors import InputError
from .app import LOOPBACK, Service, Settings
from .pool import StreamPool

_log = logging.getLogger(__name__)
POLL_S = 0.1  # while draining
REFRESH_S = 0.5  # of the terminal
SPARE_CONNECTIONS = 128  # beyond those of streams
PING_S = 5.0


class _Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, which notices within two pings that a client is gone, and then forgets the messages that wait.

    While messages wait it reads nothing, so that the end of a connection shows only when it writes. A refused handshake
    is complete: uvicorn would log an error for each.
    """

    def schedule_ping(self) -> None:
        self.ping_timer = self.loop.call_later(PING_S, self.send_keepalive_ping)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        for event in [self.queue.get_nowait() for _ in range(self.queue.qsize())]:
            if event["type"] != "websocket.receive":
                self.queue.put_nowait(event)
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops. `address` is known once it listens."""

    def __init__(self, service: Service, listener: socket.socket, drain_s: float = 10.0, dashboard: bool = False):
        limits = service.settings.connection
        super().__init__(
            uvicorn.Config(
                service.app(), log_level="warning", lifespan="on", server_header=False, timeout_graceful_shutdown=2,
                ws=_Protocol, ws_max_size=limits.message_bytes, ws_per_message_deflate=False, ws_ping_interval=PING_S,
                ws_ping_timeout=None,  # a pong may stand behind much input that waits; TCP_USER_TIMEOUT instead
                limit_concurrency=2 * service.pool.slots.capacity + SPARE_CONNECTIONS,
            )
        )  # fmt: skip
        self.service, self.listener, self.drain_s, self.dashboard = service, listener, drain_s, dashboard
        self._draining: asyncio.Task[None] | None = None
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * limits.stalled_s))

    @property
    def address(self) -> str:
        """The server's URL."""
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watcher = asyncio.create_task(self._show()) if self.dashboard else None
        try:
            await super().serve(sockets or [self.listener])
        finally:
            if watcher is not None:
                watcher.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = True
            self.force_exit = True
            return
        self.service.draining = True
        _log.info("stopping: %d streams have %g s to end", self.service.pool.stats().open, self.drain_s)
        loop = self._loop
        loop.call_soon_threadsafe(lambda: setattr(self, "_draining", loop.create_task(self._drain())))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def _drain(self) -> None:
        for _ in range(int(self.drain_s / POLL_S)):
            if not self.service.clients:
                break
            await asyncio.sleep(POLL_S)
        self.should_exit = True

    async def _show(self) -> None:
        with Live(self._table(), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(REFRESH_S)
                live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        stats = self.service.pool.stats()
        table = Table(
            "streams", "waiting frames", "tick p50, p99", "times real time", "encoded, decoded", title=self.address
        )
        table.add_row(
            f"{stats.open} of {stats.capacity}", str(stats.waiting_frames),
            f"{stats.tick_p50_ms:.1f}, {stats.tick_p99_ms:.1f} ms", f"{stats.real_time_factor:.1f}",
            f"{stats.encoded_frames:,}, {stats.decoded_frames:,} frames",
        )  # fmt: skip
        return table


@contextmanager
def in_thread(pool: StreamPool, settings: Settings | None = None, *, port: int = 0) -> Iterator[Server]:
    """A server on 127.0.0.1 in a thread of this process, while the context lasts; yielded once it listens."""
    with listen("127.0.0.1", port) as listener:
        server = Server(Service(pool, settings or Settings()), listener)
        thread = threading.Thread(target=server.run, name="fastmimi server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
                time.sleep(0.005)
            yield server
        finally:
            server.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises InputError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    # Connections inherit it. Without it a small message waits for the receipt of the one before, up to 40 ms; asyncio
    # turns it on only for listeners that it opened.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def checked(settings: Settings, host: str, token_file: Path | None) -> Settings:
    """The settings for an address; raises InputError where other machines could connect without a token."""
    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {token_file}: {error}") from None
        if len(token) < 16 or not token.isascii() or not token.isprintable():
            raise InputError(f"the token in {token_file} must be at least 16 printable ASCII characters")
    if not is_loopback(host):
        if token is None:
            raise InputError(f"a server on {host} can be reached by other machines: give it a --token-file")
        return replace(settings, token=token, hosts=())
    return replace(settings, token=token, hosts=(*LOOPBACK, host))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(
    pool: StreamPool, settings: Settings, listener: socket.socket, *, drain_s: float = 10.0, dashboard: bool = False
) -> None:
    """Serve on a socket (`listen`) until a signal."""
    server = Server(Service(pool, settings), listener, drain_s, dashboard)
    Console(stderr=True).print(f"fastmimi serves {settings.model} on {server.address}", highlight=False)
    server.run()
