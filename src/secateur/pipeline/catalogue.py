"""The catalogue of methods, allocations and ways to recover as plain data."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from secateur.core.errors import RecipeError, did_you_mean
from secateur.core.method import METHODS, Method
from secateur.recovery.base import RECOVERIES
from secateur.weights.allocation import ALLOCATIONS

__all__ = ["methods"]


def methods(name: str | None = None) -> list[dict[str, Any]]:
    """Facts about every method, allocation and way to recover, or about the one called `name`.

    Returns:
        A list of dictionaries: id, family, summary, removes, effect, statistics, paper, url, options.

    Raises:
        RecipeError: an unknown name, with a suggestion.
    """
    known: dict[str, type[Method]] = {**dict(METHODS), **dict(ALLOCATIONS), **dict(RECOVERIES)}
    if name is None:
        return [_facts(method) for method in known.values()]
    if name not in known:
        raise RecipeError(f"unknown method {name!r}", "", did_you_mean(name, known))
    return [_facts(known[name])]


def _facts(method: type[Method]) -> dict[str, Any]:
    paper = method.paper
    return {
        "id": method.id,
        "family": method.family,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "removes": method.removes,
        "effect": method.effect,
        "statistics": sorted(method.needs),
        "paper": f"{paper.title} ({paper.year})" if paper else "",
        "url": paper.url if paper else "",
        "options": [
            {
                "name": key,
                "type": getattr(field.annotation, "__name__", None)
                or str(field.annotation).replace("typing.", ""),
                "default": field.default,
                "description": field.description or "",
            }
            for key, field in _fields(method).items()
        ],
    }


def _fields(method: type[Method]) -> dict[str, FieldInfo]:
    """The options of a method, and those that only other modes of it have."""
    found = dict(method.model_fields)
    for mode, serving in method.modes.items():
        for key, field in serving.model_fields.items():
            if key not in found:
                found[key] = FieldInfo.merge_field_infos(
                    field, description=f"mode={mode}: {field.description}"
                )
    return found
