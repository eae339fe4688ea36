"""What a plan must come down to: parameters, bytes or milliseconds of the whole model, as what every kind of
unit costs at every width."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.core.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Goal", "fewest"]


@dataclass(frozen=True)
class Goal:
    """A limit that a plan never exceeds.

    Attributes:
        unit: `parameters`, `bytes` or `milliseconds`, for messages.
        limit: of the whole model.
        rest: cost of everything that is not a unit.
        costs: for each group (count + 1,) float64, the cost of keeping k of its units; never falls with k.
    """

    unit: str
    limit: float
    rest: float
    costs: Sequence[Tensor]

    @classmethod
    def linear(
        cls, unit: str, limit: float, whole: float, counts: Sequence[int], each: Sequence[float]
    ) -> Goal:
        """Of units that cost alike inside a group.

        Args:
            whole: cost of the model with all units.
            counts, each: for each group how many units it has, and what one costs.
        """
        import torch

        costs = [
            torch.arange(count + 1, dtype=torch.float64) * cost
            for count, cost in zip(counts, each, strict=True)
        ]
        return cls(unit, limit, whole - sum(float(cost[-1]) for cost in costs), costs)

    def cost(self, kept: Sequence[int]) -> float:
        """Of the whole model when each group keeps so many units."""
        return self.rest + sum(float(costs[count]) for costs, count in zip(self.costs, kept, strict=True))

    def met(self, kept: Sequence[int]) -> bool:
        return self.cost(kept) <= self.limit

    def require_below(self, dense: float, budget: str | None) -> None:
        """Raises `RecipeError` for a budget that the dense model keeps already."""
        if self.limit >= dense:
            raise RecipeError(
                f"budget {budget}", f"less than the dense model has: {dense:,.6g} {self.unit}", "lower it"
            )

    def require_reachable(self, floors: Sequence[int], what: str, remedy: str) -> None:
        """Raises `RecipeError` for a limit below what the model costs at the floors of all groups.

        Args:
            what: that is left then.
        """
        least = self.cost(floors)
        if least > self.limit:
            raise RecipeError(
                f"a budget of {self.limit:,.6g} {self.unit}", f"at least {least:,.6g}: {what}", remedy
            )

    def facts(self, planned: float, whole: Sequence[int]) -> dict[str, float | str]:
        """For a report: what a plan comes to and what all units (`whole`: their counts) do."""
        return {"unit": self.unit, "limit": self.limit, "planned": planned, "dense": self.cost(whole)}


def fewest(enough: Callable[[int], bool], most: int) -> int:
    """The smallest number that is enough, where more always is; `most` is known to be."""
    return bisect_left(range(most), True, key=enough)
