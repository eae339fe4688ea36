"""A weight-pruning method: a score, a selection, and sometimes an update of what stays.

The catalogue imports every method. They import torch inside their functions, so that listing needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator

from secateur.core.errors import RecipeError, did_you_mean
from secateur.core.method import METHODS, Method, register
from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from secateur.anatomy.permute import Reorder
    from secateur.core.factored import Factored

__all__ = ["OtherMethod", "Problem", "Solution", "WeightMethod", "input_norms", "register", "weight_method"]


@dataclass
class Problem:
    """One matrix to prune.

    Attributes:
        name: for messages and the report, such as `3.self_attn.q_proj`.
        weight: (out, in) float32; a method does not change it in place.
        inputs: what was observed of its input.
        pattern: resolved comparison group (`row`, `matrix` or `n:m`).
        sparsity: fraction to remove.
        gradient: (out, in) float32 accumulated gradient magnitude, where the method asked for it.
        generator: seeded for this very matrix, independent of the order of work.
        reorder: how the inputs may be reordered, where the caller can fold that into what produces them.
    """

    name: str
    weight: Tensor
    inputs: InputStatistics
    pattern: Pattern
    sparsity: float
    gradient: Tensor | None = None
    generator: torch.Generator | None = None
    reorder: Reorder | None = None


@dataclass
class Solution:
    """What a method made of a matrix.

    Attributes:
        weight: (out, in) float32 with zeros where `kept` is False (see `WeightMethod.leaves_zeros`).
        kept: (out, in) bool.
        notes: numbers worth reporting (iterations, losses).
        fallbacks: what had to be done differently than asked, one plain phrase each.
        orders: (parts, width) int64 new order of the inputs, in which `kept` holds an N:M pattern, where
            that is not the stored one (only for a problem with a `reorder`).
        factored: what `weight` is the product of, where that is to be stored instead.
    """

    weight: Tensor
    kept: Tensor
    notes: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    orders: Tensor | None = None
    factored: Factored | None = None

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, **rest: Any) -> Solution:
        """The kept weights as they are, a positive zero everywhere else."""
        return cls(weight.masked_fill(~kept, 0.0), kept, **rest)


class WeightMethod(Method):
    """Base of the methods that set single weights to zero.

    Most methods are one `score`. Those that also move the remaining weights override `prune`.

    Class variables:
        default_pattern: what `unstructured` means.
        leaves_zeros: whether a weight is zero where `Solution.kept` is False; not where a sparse core is
            multiplied with something dense.
    """

    family: ClassVar[str] = "weights"
    removes: ClassVar[str] = "single weights"
    effect: ClassVar[str] = "unstructured zeros in a dense file: not smaller and not faster by themselves"
    default_pattern: ClassVar[Pattern] = Pattern("row")
    leaves_zeros: ClassVar[bool] = True

    @property
    def stores_factors(self) -> bool:
        """Whether `Solution.factored` is to be stored in place of the weight."""
        return False

    def score(self, problem: Problem) -> Tensor:
        """(out, in) importance of each weight; the smallest go."""
        raise RecipeError(
            f"method {self.id!r} where a score of single weights is needed", "a scoring method", "use wanda"
        )

    def prune(self, problem: Problem) -> Solution:
        """Drop the smallest scores of each comparison group."""
        from secateur.core.selection import select

        scores = self.score(problem)
        return Solution.of(
            problem.weight, select(scores, problem.pattern, problem.sparsity, name=problem.name)
        )


def weight_method(name: str, options: dict[str, Any] | None = None) -> WeightMethod:
    """The method of this family called `name`. Raises `RecipeError` for any other name."""
    found = METHODS.get(name)
    if not issubclass(found, WeightMethod):
        raise RecipeError(
            f"method {name!r}, which removes {found.removes}", "one that removes single weights", "use wanda"
        )
    made: WeightMethod = found.from_options(options or {})
    return made


def input_norms(inputs: InputStatistics) -> Tensor:
    """(in,) float32 norms of Wanda; inputs that were always zero get a tiny one, so that the weights
    behind them still compete by magnitude instead of by position."""
    return inputs.input_norms().clamp_min(1e-30)


def _check_known(name: str) -> str:
    if name and name not in METHODS:
        raise ValueError(f"a known method; {did_you_mean(name, METHODS.names())}")
    return name


OtherMethod = Annotated[str, AfterValidator(_check_known)]
"""An option that names another method of the catalogue (empty: none)."""
