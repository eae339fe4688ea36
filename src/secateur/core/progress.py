"""How long work tells whoever waits for it: an interface here, a rich bar in the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

__all__ = ["SILENT", "Progress", "Silent", "Task"]

T = TypeVar("T")


class Task(Protocol):
    """One bar: `advance` by steps of its total, `note` shows a short text such as a loss."""

    def advance(self, steps: int = 1, note: str = "") -> None: ...


class Progress(Protocol):
    """Whoever shows progress. `task` is a context manager; the bar ends with it."""

    def task(self, title: str, total: int) -> TaskContext: ...


class TaskContext(Protocol):
    def __enter__(self) -> Task: ...
    def __exit__(self, *exc: object) -> bool | None: ...


class _SilentTask:
    def advance(self, steps: int = 1, note: str = "") -> None:
        return


class Silent:
    """Shows nothing: the default of the Python functions."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        yield _SilentTask()


SILENT: Progress = Silent()  # type: ignore[assignment]


def track(progress: Progress, title: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Iterate with a bar."""
    with progress.task(title, total) as task:
        for item in items:
            yield item
            task.advance()
