"""Names to things, loaded at first use, open to other packages through entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from secateur.core.errors import RecipeError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A catalogue of one kind of thing.

    Modules named in `lazy` are imported the first time their name is asked for; packages installed
    beside secateur add theirs through the entry point group `group`. A plug-in that fails to import
    is reported by name when it, or the whole catalogue, is asked for.

    >>> numbers: Registry[int] = Registry("number", group=None)
    >>> numbers.register("one")(1)
    1
    >>> numbers.get("one")
    1
    """

    def __init__(self, kind: str, group: str | None, lazy: dict[str, str] | None = None) -> None:
        self.kind, self.group = kind, group
        self._lazy = dict(lazy or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: put the decorated thing into the catalogue under `name`."""

        def add(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and known is not entry:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known!r} and {entry!r}")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """Every known name, without importing what stands behind it."""
        return sorted({*self._entries, *self._lazy, *self._plugins()})

    def get(self, name: str) -> T:
        """The entry called `name`. Raises `RecipeError` with a suggestion for an unknown name."""
        if name not in self._entries:
            self._load(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return ((name, self.get(name)) for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _plugins(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self.group is None:
            return {}
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}

    def _load(self, name: str) -> None:
        if name in self._lazy:
            importlib.import_module(self._lazy[name])
            return
        plugin = self._plugins().get(name)
        if plugin is None:
            raise RecipeError(f"unknown {self.kind} {name!r}", "", did_you_mean(name, self.names()))
        try:
            self._entries.setdefault(name, plugin.load())
        except Exception as error:
            raise RecipeError(
                f"the plug-in {plugin.value!r} for {self.kind} {name!r} does not load ({error})",
                "a package that imports",
                "reinstall or remove it",
            ) from error
