"""Kill a command at random moments, then let it end: what it leaves must be as if it had never been killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def until_it_ends(
    command: Sequence[str], *, kills: int, began: Callable[[], bool], most_s: float, seed: int = 0,
    cwd: str | Path | None = None,
) -> list[int]:  # fmt: skip
    """Run a command of Python (`-m module ...`), kill -9 it `kills` times, and then let it run.

    A run is killed up to `most_s` seconds after `began` says that it is at work. The exit codes: -9 where the kill came
    before the end. Raises RuntimeError if the last run fails.
    """
    draw, codes = random.Random(seed), []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for last in [False] * kills + [True]:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if not last:
            while not began() and process.poll() is None:
                _wait(process, 0.01)
            _wait(process, draw.uniform(0, most_s))
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].decode()
        codes.append(process.returncode)
        if last and process.returncode != 0:
            raise RuntimeError(f"the last run failed: {said}")
    return codes


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
