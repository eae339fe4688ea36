"""OSSCAR: remove what the rest can make up for, and let it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import Compensation, StructureMethod, UnitProblem, register
from secateur.structure.elimination import eliminate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Osscar"]


@register
class Osscar(StructureMethod):
    """Exact increase of the least-squares loss when a unit goes and the others are refitted, greedily
    (structured-baselines, section 2.5).

    A unit's score is the loss at the moment greedy elimination reaches it, so that the removed sets of all
    ratios are nested and one pass serves them all. The paper's local search over swaps is left out.
    """

    id: ClassVar[str] = "osscar"
    paper: ClassVar[Paper | None] = Paper(
        "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization",
        2024,
        "2403.12983",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    compensate: Compensation = Field(
        "least_squares", description="none, bias (mean output) or least_squares (refit on what stays)"
    )
    rounds: int = Field(64, ge=1, description="steps of the elimination; more are slower and more exact")
    damping: float = Field(1e-2, gt=0, description="fraction of the mean diagonal added to the Hessian")

    def score(self, problem: UnitProblem) -> Tensor:
        assert problem.inputs.hessian is not None
        return eliminate(
            problem.weight, problem.inputs.hessian, problem.units, rounds=self.rounds, damping=self.damping
        ).losses
