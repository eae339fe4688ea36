"""NoWag-P: what a weight adds to its output once rows and columns are of one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.pattern import Pattern
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, WeightMethod, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NowagP"]


@register
class NowagP(WeightMethod):
    """Score N_ij^2 * a_j of the matrix N with unit columns, then unit rows, compared within the matrix
    (armor, sections 2.2 and 2.4)."""

    id: ClassVar[str] = "nowag-p"
    paper: ClassVar[Paper | None] = Paper(
        "NoWag: A Unified Framework for Shape Preserving Compression of Large Language Models",
        2025,
        "2504.14569",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")

    def score(self, problem: Problem) -> Tensor:
        from secateur.weights.nowag import normalise

        return normalise(problem.weight, problem.inputs).importance()
