"""OSSCAR: remove what the rest can make up for, and let it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import Compensation, Losses, StructureMethod, UnitProblem, register
from secateur.structure.elimination import eliminate
from secateur.structure.local_search import improved

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Osscar"]


@register
class Osscar(StructureMethod):
    """Exact increase of the least-squares loss when a unit goes and the others are refitted, greedily
    (structured-baselines, section 2.5).

    A unit's score is the loss at the moment greedy elimination reaches it, so that the removed sets of all
    ratios are nested and one pass serves them all. `swaps` then improves the set of one ratio.
    """

    id: ClassVar[str] = "osscar"
    paper: ClassVar[Paper | None] = Paper(
        "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization",
        2024,
        "2403.12983",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    unscored: ClassVar[frozenset[str]] = frozenset({"swaps", "swap_rounds"})
    losses: ClassVar[Losses] = "total"

    compensate: Compensation = Field(
        "least_squares", description="none, bias (mean output) or least_squares (refit on what stays)"
    )
    rounds: int = Field(64, ge=1, description="steps of the elimination; more are slower and more exact")
    damping: float = Field(1e-2, gt=0, description="fraction of the mean diagonal added to the Hessian")
    swaps: int = Field(
        0,
        ge=0,
        description="units exchanged at once in a local search before the refit; 0 for none, paper: 100",
    )
    swap_rounds: int = Field(20, ge=1, description="rounds of the local search, at most")

    @model_validator(mode="after")
    def _check_swaps(self) -> Osscar:
        if self.swaps and self.compensate != "least_squares":
            raise ValueError("swaps are judged by the refit: they need compensate=least_squares")
        return self

    def refine(self, problem: UnitProblem, kept: Tensor) -> Tensor:
        return improved(problem, kept, self.swaps, self.swap_rounds) if self.swaps else kept

    def score(self, problem: UnitProblem) -> Tensor:
        assert problem.inputs.hessian is not None
        return eliminate(
            problem.weight, problem.inputs.hessian, problem.units, rounds=self.rounds, damping=self.damping
        ).losses
