"""What a plan must come down to: parameters, bytes or milliseconds of the whole model, as what every kind of
unit costs at every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Goal"]


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

    def cost(self, kept: Sequence[int]) -> float:
        """Of the whole model when each group keeps so many units."""
        return self.rest + sum(float(costs[count]) for costs, count in zip(self.costs, kept, strict=True))

    def met(self, kept: Sequence[int]) -> bool:
        return self.cost(kept) <= self.limit
