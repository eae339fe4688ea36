"""Which weights compete with each other when some are dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from secateur.core.errors import RecipeError, did_you_mean

__all__ = ["InputOrder", "Pattern"]

Kind = Literal["unstructured", "row", "matrix", "global", "n:m"]
InputOrder = Literal["none", "snake", "hungarian"]
"""How the inputs of a matrix are put in order, so that an N:M pattern keeps more of the score."""
WORDS = ("unstructured", "row", "matrix", "global")


@dataclass(frozen=True)
class Pattern:
    """A comparison group.

    `row`: within one output neuron. `matrix`: within one matrix. `global`: over all matrices of all
    blocks. `n:m`: keep `keep` of every `of` consecutive inputs. `unstructured`: whichever of the
    first two the method was published with.

    >>> Pattern.parse("2:4").sparsity
    0.5
    """

    kind: Kind
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `unstructured`, `row`, `matrix`, `global` or `N:M`. Raises `RecipeError`."""
        word = text.strip().lower()
        if word in WORDS:
            return cls(word)  # type: ignore[arg-type]
        match = re.fullmatch(r"(\d+):(\d+)", word)
        if not match:
            raise RecipeError(
                f"pattern {text!r}",
                "'unstructured', 'row', 'matrix', 'global' or 'N:M'",
                did_you_mean(word, WORDS),
            )
        keep, of = int(match[1]), int(match[2])
        if not 0 < keep < of:
            raise RecipeError(
                f"pattern {text!r}", "N:M with 0 < N < M (keep N of every M inputs)", "for example 2:4"
            )
        return cls("n:m", keep, of)

    @property
    def sparsity(self) -> float | None:
        """The sparsity an N:M pattern fixes, `None` for the others."""
        return 1 - self.keep / self.of if self.kind == "n:m" else None

    def resolve(self, default: Pattern) -> Pattern:
        """Replace `unstructured` by the method's own group."""
        return default if self.kind == "unstructured" else self

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.kind == "n:m" else self.kind
