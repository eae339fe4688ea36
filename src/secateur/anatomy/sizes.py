"""The sizes of a family file, evaluated against the values of one configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.anatomy.axes import evaluate, parse_axis
from secateur.anatomy.config import Lookup
from secateur.anatomy.family import Family, listed
from secateur.anatomy.model import Axis
from secateur.core.errors import AnatomyError

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Numbers that the axes of one model are made of.

    Attributes:
        model_type: for messages.
        spaces: dimensions that can be resized.
        others: what else shapes are made of.
    """

    model_type: str
    spaces: dict[str, int]
    others: dict[str, int]

    @classmethod
    def of(cls, family: Family, model_type: str, lookup: Lookup) -> Sizes:
        """Those sizes that the config gives; others are missed only when a parameter needs them."""
        return cls(model_type, _evaluated(family.spaces, lookup), _evaluated(family.sizes, lookup))

    def axis(self, expression: str) -> Axis:
        """One dimension. Raises `AnatomyError` when it needs a size that the config does not give."""
        try:
            return parse_axis(expression, self.spaces, self.others)
        except AnatomyError as error:
            raise AnatomyError(
                f"{error} (family file of {self.model_type!r})",
                "",
                "check the config for missing keys",
            ) from error

    def axes(self, expressions: Iterable[str]) -> tuple[Axis, ...]:
        """`axis` of each."""
        return tuple(map(self.axis, expressions))


def _evaluated(expressions: Mapping[str, str | list[str]], lookup: Lookup) -> dict[str, int]:
    def number(key: str) -> int | None:
        value = lookup(key)
        return value if isinstance(value, int) else None

    found: dict[str, int] = {}
    for name, alternatives in expressions.items():
        values = (evaluate(expression, number) for expression in listed(alternatives))
        value = next((value for value in values if value is not None), None)
        if value is not None:
            found[name] = value
    return found
