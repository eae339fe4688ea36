"""Experts by how much they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.statistics import Statistic
from secateur.experts.base import ExpertMethod, ExpertProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FrequencyExperts"]


@register
class FrequencyExperts(ExpertMethod):
    """Share of the tokens that visit an expert, or the mean weight it gets (stun, section 2.8, `freq`).

    An expert that no token visited scores zero and goes first.
    """

    id: ClassVar[str] = "frequency-experts"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing"})
    comparable: ClassVar[bool] = True

    weighting: Literal["counts", "gates"] = Field(
        "counts", description="counts: every visit is one; gates: every visit is its routing weight"
    )

    def score(self, problem: ExpertProblem) -> Tensor:
        routing = problem.observed
        visits = routing.counts if self.weighting == "counts" else routing.gates
        return visits / max(routing.tokens, 1)
