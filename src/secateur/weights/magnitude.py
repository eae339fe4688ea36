"""Magnitude pruning: small weights go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.pattern import Pattern
from secateur.weights.base import Problem, WeightMethod, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magnitude"]


@register
class Magnitude(WeightMethod):
    """Score |W|, compared within the matrix (one-shot-baselines, section 2.2). Needs no data."""

    id: ClassVar[str] = "magnitude"
    paper: ClassVar[Paper | None] = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks", 2015, "1506.02626"
    )
    default_pattern: ClassVar[Pattern] = Pattern("matrix")

    def score(self, problem: Problem) -> Tensor:
        return problem.weight.abs()
