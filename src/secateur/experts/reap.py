"""REAP: what an expert adds to the tokens that visit it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.experts.base import ExpertMethod, ExpertProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reap"]


@register
class Reap(ExpertMethod):
    """Mean over the tokens that visit an expert of routing weight times norm of its output.

    How often it is visited does not count, save that an expert without a visit scores zero and goes first.
    """

    id: ClassVar[str] = "reap"
    paper: ClassVar[Paper | None] = Paper(
        "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", 2025, "2510.13999"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing", "expert_norms"})

    def score(self, problem: ExpertProblem) -> Tensor:
        routing = problem.observed
        if routing.norms is None:
            raise ValueError("the norms of the experts' outputs were not observed")
        return routing.norms / routing.counts.clamp_min(1)
