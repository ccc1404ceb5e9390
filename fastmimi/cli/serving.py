"""The command `serve`: checks before any work, the pool, and the server."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..errors import InputError
from . import report, work

REQUIRED_PACKAGES = ("msgspec", "prometheus_client", "starlette", "uvicorn", "websockets")


def serve(
    model: str, host: str, port: int, streams: int, frames_per_tick: int, codebooks: int | None, device: str,
    dtype: str, weights: str | None, impl: str, threads: int | None, token_file: Path | None, origins: list[str],
    per_client: int, upload_mb: int, idle_s: float, drain_s: float, quiet: bool,
) -> None:  # fmt: skip
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'fastmimi[serve]'")
    for name, value in {
        "streams": streams, "frames-per-tick": frames_per_tick, "per-client": per_client,
        "upload-mb": upload_mb, "idle-s": idle_s, "threads": 1 if threads is None else threads,
    }.items():  # fmt: skip
        if value <= 0:
            raise InputError(f"--{name} must be positive, got {value}")
    from ..serve import server
    from ..serve.app import Settings
    from ..serve.connection import ConnectionLimits
    from ..serve.pool import Limits, StreamPool

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings(
        model=model, origins=tuple(origins), streams_per_client=per_client, upload_bytes=upload_mb << 20,
        connection=ConnectionLimits(idle_s=idle_s),
    )  # fmt: skip
    settings = server.checked(settings, host, token_file)
    with server.listen(host, port) as listener:  # before the model is loaded
        if threads is not None:
            torch.set_num_threads(threads)
        codec = work.load(model, device, dtype, impl, weights_as=weights)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("recording steps", total=None)
            pool = StreamPool(
                codec, streams, num_codebooks=codebooks, frames_per_tick=frames_per_tick,
                limits=Limits(pool_s=streams * Limits.stream_s),  # one client's flood is no other's
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        report.note(f"{streams} streams take {streams * pool.slots.bytes_per_slot / 2**20:,.0f} MiB")
        dashboard = not quiet and Console(stderr=True).is_terminal
        server.run(pool, settings, listener, drain_s=drain_s, dashboard=dashboard)
