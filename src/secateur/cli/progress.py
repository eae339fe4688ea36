"""Progress for people: a bar with an ETA on a terminal, a line now and then in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["progress_for"]

LOG_INTERVAL_SECONDS = 10.0


class _BarTask:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)


class Bars:
    """One live display; nested tasks stack."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[_BarTask]:
        if not self._open:
            self._progress.start()
        self._open += 1
        task = self._progress.add_task(title, total=total, note="")
        try:
            yield _BarTask(self._progress, task)
        finally:
            self._progress.remove_task(task)
            self._open -= 1
            if not self._open:
                self._progress.stop()


class _LineTask:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = self._said = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._said < LOG_INTERVAL_SECONDS:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        tail = f", {note}" if note else ""
        sys.stderr.write(f"{self._title}: {self._done}/{self._total}{tail}, about {left:.0f} s left\n")


class Lines:
    """A line every ten seconds, for logs."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[_LineTask]:
        yield _LineTask(title, total)


def progress_for(quiet: bool = False) -> Bars | Lines:
    """Bars on a terminal, lines elsewhere or when `quiet` (JSON output)."""
    return Bars() if sys.stderr.isatty() and not quiet else Lines()
