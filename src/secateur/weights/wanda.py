"""Wanda: a weight matters as much as what flows through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, WeightMethod, input_norms, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Wanda"]


@register
class Wanda(WeightMethod):
    """Score |W_ij| * sqrt(a_j), compared within each output row (one-shot-baselines, section 2.3)."""

    id: ClassVar[str] = "wanda"
    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models", 2023, "2306.11695"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})

    def score(self, problem: Problem) -> Tensor:
        return problem.weight.abs() * input_norms(problem.inputs)
