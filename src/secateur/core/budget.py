"""A size or a speed to come down to: `parameters=1.2M`, `bytes=900MB`, `decode=12ms`, or a share of the dense
model, `decode=0.8x`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.core.errors import RecipeError, did_you_mean

__all__ = ["Target"]

SHARE = "x"
UNITS: dict[str, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "bytes": {
        "": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    },
    "decode": {"ms": 1, "s": 1e3, "us": 1e-3},
}  # fmt: skip
EXAMPLES = "parameters=1.2M, bytes=900MB, decode=12ms or decode=0.8x"


@dataclass(frozen=True)
class Target:
    """Attributes:
    kind: `parameters` or `bytes` of all files of the model, embeddings included, or `decode`: milliseconds
        a token, one sequence, on this machine.
    value: in that unit, or a share of the dense model.
    relative: it is a share.
    """

    kind: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read what stands behind `--budget`. Raises `RecipeError` with the nearest thing that exists.

        >>> Target.parse("bytes=1.5GB")
        Target(kind='bytes', value=1500000000.0, relative=False)
        """
        kind, sign, amount = (part.strip() for part in text.partition("="))
        if kind not in UNITS:
            raise RecipeError(f"budget {text!r}", EXAMPLES, did_you_mean(kind, UNITS))
        found = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)", amount)
        if not sign or not found:
            raise RecipeError(f"budget {text!r}", f"a number with its unit, such as {EXAMPLES}")
        number, unit = float(found[1]), found[2]
        units = UNITS[kind]
        if unit == SHARE:
            if not 0 < number < 1:
                raise RecipeError(f"budget {text!r}", "a share of the dense model between 0 and 1", "0.8x")
            return cls(kind, number, True)
        known = {name.lower(): factor for name, factor in units.items()}
        if unit.lower() not in known:
            names = [name for name in (*units, SHARE) if name]
            raise RecipeError(f"unit {unit!r} in budget {text!r}", "", did_you_mean(unit, names))
        if number <= 0:
            raise RecipeError(f"budget {text!r}", "more than nothing")
        return cls(kind, number * known[unit.lower()], False)

    def of(self, dense: float) -> float:
        """The number itself, for a dense model of this many parameters, bytes or milliseconds."""
        return self.value * dense if self.relative else self.value
