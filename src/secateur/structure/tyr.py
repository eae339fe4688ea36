"""Týr-the-Pruner: prune every block at several levels, and search which block gets which."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import SearchMethod, UnitProblem, register
from secateur.structure.elimination import eliminate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tyr"]


@register
class Tyr(SearchMethod):
    """Second-order elimination of heads and channels; the shares of the blocks are found by evolution
    (tyr-the-pruner, sections 2.1 to 2.5).

    One nested elimination gives all levels of a matrix. The paper adds a first-order term to the loss, which
    its own derivation does not need: `first_order_weight=1` does the same.
    """

    id: ClassVar[str] = "tyr"
    paper: ClassVar[Paper | None] = Paper(
        "Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization",
        2025,
        "2503.09657",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    rounds: int = Field(64, ge=1, description="steps of the elimination; more are slower and more exact")
    damping: float = Field(1e-2, gt=0, description="fraction of the mean diagonal added to the Hessian")
    first_order_weight: float = Field(
        0.0, ge=0, description="of the share of the output that a unit carries, beside the loss (paper: 1)"
    )

    def score(self, problem: UnitProblem) -> Tensor:
        """(count,) place of each unit in the order in which they go."""
        assert problem.inputs.hessian is not None
        found = eliminate(
            problem.weight,
            problem.inputs.hessian,
            problem.units,
            rounds=self.rounds,
            damping=self.damping,
            first_order_weight=self.first_order_weight,
        )
        return found.order.argsort().double()
