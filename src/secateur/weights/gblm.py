"""GBLM-Pruner: what the loss of the whole model feels, added to what the layer feels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, Solution, WeightMethod, input_norms, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gblm"]

SAMPLED = 65_536
"""Entries from which the median ratio of the two terms is read."""


@register
class Gblm(WeightMethod):
    """Score |W_ij| * (sqrt(a_j) + alpha * G_ij), compared within each row (gblm-pruner, section 2.2).

    G gathers the gradients of single calibration sequences, sum |g| (`l1`) or sqrt(sum g^2) (`l2`). The
    two terms have different units, so `alpha` means something else for another number of sequences
    unless `normalise` is `mean`; the median of alpha * G / sqrt(a) is reported for every matrix.
    """

    id: ClassVar[str] = "gblm"
    paper: ClassVar[Paper | None] = Paper(
        "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023, "2311.04902"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "gradient"})

    norm: Literal["l1", "l2"] = Field("l2", description="how gradients of single sequences add up")
    alpha: float = Field(100.0, ge=0, description="weight of the gradient term")
    normalise: Literal["sum", "mean"] = Field("sum", description="sum as published, or mean over sequences")
    activations: bool = Field(True, description="False leaves the gradient term alone")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs if self.activations else frozenset({"gradient"})

    def score(self, problem: Problem) -> Tensor:
        gradient = self._gradient(problem)
        if not self.activations:
            return problem.weight.abs() * gradient
        return problem.weight.abs() * (input_norms(problem.inputs) + gradient)

    def prune(self, problem: Problem) -> Solution:
        solution = super().prune(problem)
        gradient = self._gradient(problem)
        if self.activations:
            solution.notes["gradient_to_activation"] = _median_ratio(gradient, input_norms(problem.inputs))
        if self.alpha > 0 and not bool(gradient.any()):
            solution.fallbacks.append("the gradient is zero everywhere: it had no say in the choice")
        return solution

    def _gradient(self, problem: Problem) -> Tensor:
        """(out, in) gradient term times alpha."""
        if problem.gradient is None:
            raise ValueError(f"the gradient of {problem.name} was not collected")
        sequences = max(problem.inputs.sequences, 1) if self.normalise == "mean" else 1
        count = sequences if self.norm == "l1" else sequences**0.5
        return problem.gradient * ((self.alpha if self.activations else 1.0) / count)


def _median_ratio(gradient: Tensor, norms: Tensor) -> float:
    """Median over evenly spaced entries of both terms' ratio."""
    stride = max(gradient.numel() // SAMPLED, 1)
    # an odd stride visits all columns whatever power of two the width is
    return float((gradient / norms).flatten()[:: stride | 1].median())
