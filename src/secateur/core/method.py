"""What every method of every family declares about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.core.errors import RecipeError, did_you_mean
from secateur.core.registry import Registry
from secateur.core.statistics import Statistic

__all__ = ["BITS", "CORE", "EXPERTS", "METHODS", "Method", "Paper", "methods_of", "register"]

BITS = "bits of the weights"
"""What goes where no weight goes."""
CORE = "weights of a core between two factors"
"""What goes where the product with the factors is stored, which has no zeros."""
EXPERTS = "routed experts"
"""What goes where a token still visits as many."""

ROOMS = {
    "weights": (
        "random",
        "magnitude",
        "wanda",
        "ria",
        "sparsegpt",
        "alps",
        "dsnot",
        "gblm",
        "nowag-p",
        "armor",
    ),
    "structure": (
        "random-structure",
        "magnitude-structure",
        "wanda-structure",
        "flap",
        "osscar",
        "cfsp",
        "llm-pruner",
        "adapt-pruner",
        "shortgpt",
        "blockpruner",
        "tyr",
        "prunenet",
        "minitron",
        "slicegpt",
    ),
    "experts": (
        "random-experts",
        "frequency-experts",
        "reap",
        "recon-experts",
        "stun",
        "merge-experts",
        "mc-moe",
        "uniform-bits",
    ),
}
"""The methods that come with secateur; each is a file of its room."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str = ""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


class Method(BaseModel):
    """Base of all methods: options are typed fields, facts about the method are class variables.

    Class variables:
        id: name on the command line.
        family: the room it lives in (`weights`, `structure`, ...).
        paper: its source.
        removes: the unit that goes.
        effect: what a user may expect of the result, in one plain sentence.
        needs: statistics that calibration must collect.
        sized_by: the option that says how much goes, in place of a sparsity; empty: a sparsity does.
        modes: by value of the option `mode`, the class of a kind of run other than its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    removes: ClassVar[str]
    effect: ClassVar[str]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    sized_by: ClassVar[str] = ""
    modes: ClassVar[Mapping[str, type[Method]]] = {}

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics these very options need (a subset or superset of `needs`)."""
        return self.needs

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Any:
        """An instance from `-O name=value` pairs, of the class that serves their `mode`. Raises `RecipeError`
        naming the option at fault."""
        if (mode := str(options.get("mode"))) in cls.modes:
            return cls.modes[mode].from_options(options)
        for name in options:
            if name not in cls.model_fields:
                raise RecipeError(
                    f"option {name!r} of {cls.id!r}",
                    "",
                    did_you_mean(name, cls.model_fields)
                    if cls.model_fields
                    else f"{cls.id!r} has no options",
                )
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            seen = f"option {name}={first['input']!r}" if name else "options"
            message = first["msg"].removeprefix("Value error, ").lower()
            raise RecipeError(f"{seen} of {cls.id!r}", message) from error


METHODS: Registry[type[Method]] = Registry(
    "method",
    "secateur.methods",
    {name: f"secateur.{room}.{name.replace('-', '_')}" for room, names in ROOMS.items() for name in names},
)
"""The catalogue of all families; packages add theirs by the entry point group `secateur.methods`."""


M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: put a method of any family into the catalogue under its `id`."""
    METHODS.register(method.id)(method)
    return method


def methods_of(family: str) -> list[str]:
    """The names of all methods of one family, sorted."""
    return [name for name, method in METHODS if method.family == family]
