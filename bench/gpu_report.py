"""The report of a run on a GPU: a JSON file that is valid at every moment, a budget, and steps that may fail or hang.

A command is a list of named steps, each of which yields rows. After each row the file is replaced atomically, so that
a run that is killed leaves what it had. A step that raises becomes a row with the exception's text, and the next one
runs. After an error that a CUDA context does not survive, and after a step that hangs, the process starts itself again
and goes on with the next step; `Report.resume` reads what was there.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this repository's package, wherever another one is installed

import torch  # noqa: E402

from fastmimi.io.files import replacing  # noqa: E402

RESULTS = ROOT / "bench" / "results"
HANGS_AFTER_S = 150  # without a new row or step
FATAL = (
    "CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "unspecified launch failure",
    "illegal memory access", "misaligned address", "device-side assert",
)  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "moshi", "numpy")
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,driver_version"

Row = dict[str, Any]


class Step(NamedTuple):
    """One part of a command; `run` yields rows. Its name is unique within the command."""

    name: str
    run: Callable[[], Iterable[Row]]


class Report:
    """The rows of a command and what else its file says."""

    def __init__(self, path: Path, command: str, dry: bool, budget: float):
        self.path, self.budget = path, budget
        self.began = time.monotonic()
        self.moved = self.began  # when something was last written
        self.lock = threading.RLock()
        self.inherited = 0  # rows of a process before this one
        self.detail: str | None = None  # what of the running step is under way
        self.content: dict[str, Any] = {
            "command": command, "dry": dry, "finished": False, "running": None, "budget_s": budget,
            "started_unix": time.time(), "machine": machine(), "done": [], "skipped": [], "rows": [],
            "step_seconds": {},  # empty if dry
        }  # fmt: skip

    @classmethod
    def resume(cls, path: Path, command: str, dry: bool, budget: float) -> Report:
        """The report that is in the file, of a process that ended in the middle of a step.

        The step counts as done, unless it names its checks and so can go on after the one that failed.
        """
        report = cls(path, command, dry, budget)
        report.content = json.loads(path.read_text(encoding="utf-8"))
        report.began -= max(0.0, time.time() - report.content["started_unix"])
        report.inherited = len(report.rows)
        running = report.content["running"]
        if running is not None and not (report.rows and report.rows[-1].get("resumable")):
            report.content["done"].append(running)
        return report

    def known(self, **keys: Any) -> Row | None:
        """The first row with these values."""
        return next((row for row in self.rows if has(row, keys)), None)

    def known_before(self, **keys: Any) -> Row | None:
        """The last row with these values that a process before this one wrote."""
        return next((row for row in reversed(self.rows[: self.inherited]) if has(row, keys)), None)

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.get("ok") is False]

    def spent(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    def add(self, row: Row) -> None:
        """Append a row, print it and write the file."""
        row = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        with self.lock:
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            self.write()
            if is_fatal(row.get("error_text", "")):
                self._start_again()

    def write(self) -> None:
        with self.lock:
            self.moved = time.monotonic()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def run(self, steps: Iterable[Step], only: str = "") -> int:
        """Run the steps whose name contains `only` and that are not done; the number of failed rows."""
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        for step in steps:
            if only not in step.name or step.name in self.content["done"]:
                continue
            if self.spent() > self.budget:
                self.content["skipped"].append(step.name)
                continue
            self.content["running"], self.detail, begun = step.name, None, time.monotonic()
            self.write()
            for row in attempted(step):
                self.add(row)
            self.content["done"].append(step.name)
            self.content["running"] = None
            if not self.content["dry"]:
                self.content["step_seconds"][step.name] = round(time.monotonic() - begun, 1)
            free_memory()
        self.content["finished"] = True
        if not self.content["dry"]:
            self.content["clocks_at_the_end"] = clocks()
        self.write()
        return len(self.failures)

    def _watch(self) -> None:
        """Stop a step in which nothing has happened for long: a kernel that never ends, say."""
        while not self.content["finished"]:
            time.sleep(0.2)
            if self.content["running"] is not None and time.monotonic() - self.moved > HANGS_AFTER_S:
                text = f"nothing happened for {HANGS_AFTER_S} s"
                self.add({"step": self.content["running"], "at": self.detail, "ok": False, "error_text": text})
                self._start_again()

    def _start_again(self) -> None:
        """Replace this process by one that goes on after the running step."""
        with self.lock:
            self.write()
            arguments = [a for a in sys.argv if a != "--resume"]
            print(f"starting again after {self.content['running']!r}", flush=True)
            os.execv(sys.executable, [sys.executable, *arguments, "--resume"])


def has(row: Row, keys: Row) -> bool:
    return all(row.get(name) == value for name, value in keys.items())


def attempted(step: Step) -> Iterator[Row]:
    """The rows of a step; an exception is the last of them."""
    try:
        for row in step.run():
            yield {"step": step.name, **row}
    except Exception as error:  # one step that fails must not end the run
        yield {"step": step.name, "ok": False, "error_text": text_of(error)}


def free_memory() -> None:
    """Give memory back that only garbage held."""
    if torch.cuda.is_available():
        gc.collect()
        with suppress(RuntimeError):  # the allocator refuses after a graph whose capture failed
            torch.cuda.empty_cache()


def text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


def is_fatal(text: str) -> bool:
    """Whether every later call in this process would fail as well."""
    return any(word in text for word in FATAL) and "out of memory" not in text


def machine() -> dict[str, Any]:
    """What ran where; None for what cannot be read."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count(), "commit": commit()}
    found |= {package: version_of(package) for package in PACKAGES}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": card.name, "capability": f"{card.major}.{card.minor}", "memory_bytes": card.total_memory,
            "processors": card.multi_processor_count, "l2_bytes": card.L2_cache_size,
        }  # fmt: skip
        found["cuda"] = torch.version.cuda
        found["clocks"] = clocks()
    return found


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clocks() -> dict[str, str] | None:
    """Clocks, power limit, temperature and driver as nvidia-smi gives them."""
    line = output_of("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0")
    return dict(zip(CLOCKS.split(","), line.split(", "), strict=False)) if line else None


def commit() -> str | None:
    """The commit of this repository, with + if files were changed since; None without git or outside a repository."""
    name = output_of("git", "rev-parse", "HEAD")
    return None if name is None else name + ("+" if output_of("git", "status", "--porcelain", "-uno") else "")


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def table(rows: list[Row], columns: Iterable[str]) -> str:
    """Rows as a Markdown table, of those columns that any row has."""
    names = [name for name in columns if any(name in row for row in rows)]
    lines = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |" for line in lines
    )


def _cell(value: Any) -> str:
    return (f"{value:.3g}" if isinstance(value, float) else str(value).replace("\n", " "))[:60]
