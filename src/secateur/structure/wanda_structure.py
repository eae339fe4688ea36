"""Wanda's score, summed over the columns of a head or channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import StructureMethod, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WandaStructure"]


@register
class WandaStructure(StructureMethod):
    """Mean over rows of |W_ij| times the norm of input j, summed over a unit (structured-baselines, 2.1)."""

    id: ClassVar[str] = "wanda-structure"
    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models", 2023, "2306.11695"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})

    def score(self, problem: UnitProblem) -> Tensor:
        columns = problem.weight.abs().mean(0) * problem.inputs.input_norms()
        return problem.units.per_unit(columns).sum(1)
