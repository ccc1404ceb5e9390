"""Progress of a run on stderr, if that is a terminal: hours done, hours per second, the time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .local import Summary


class Bars:
    """Context manager with the bars of a run: first of probing files, then of tokenising."""

    def __init__(self, shown: bool = True):
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
        )
        self._task = self._progress.add_task("finding audio", total=None)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.update(self._task, description=text, total=None)

    def probing(self, done: int, total: int) -> None:
        self._progress.update(self._task, description="reading headers", completed=done, total=total)

    def verifying(self, done: int, total: int) -> None:
        self._progress.update(self._task, description="checking shards", completed=done, total=total)

    def tokenizing(self, now: Summary) -> None:
        hours, failed = now.seconds / 3600, f", {now.errors} errors" if now.errors else ""
        self._progress.update(
            self._task, completed=now.seconds, total=max(now.total_seconds, now.seconds),
            description=f"{hours:.2f} h done, {now.speed / 3600:.4f} h/s{failed}",
        )  # fmt: skip
