"""DSnoT: swap dropped and kept weights until the mean output is right again, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import InputStatistics, Statistic
from secateur.weights.base import (
    OtherMethod,
    Problem,
    Solution,
    WeightMethod,
    input_norms,
    register,
    weight_method,
)

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.weights.swaps import InGroup, InRow, Rows

__all__ = ["Dsnot"]


@register
class Dsnot(WeightMethod):
    """Prune and regrow on top of another mask (one-shot-baselines, section 2.9).

    With D_j = W_j * mean_j a row is off by eps = sum of D over what it dropped. Each cycle takes back the
    dropped weight that moves eps most for its variance, and drops the least important kept one (by Wanda's
    score) that moves it the same way. All rows run at once. A row ends with the first swap that would not
    lower |eps|; the published code goes on to and fro around zero (`overshoot`), which in narrow matrices
    replaces good weights for nothing. The weights themselves are those of the dense model, whatever method
    chose the first mask.
    """

    id: ClassVar[str] = "dsnot"
    paper: ClassVar[Paper | None] = Paper(
        "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", 2023, "2310.08915"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "mean"})

    base: OtherMethod = Field("wanda", min_length=1, description="method of the first mask")
    cycles: int = Field(50, ge=0, description="most swaps in a row")
    threshold: float = Field(0.1, ge=0, description="|eps| at which a row is left alone")
    power: float = Field(1.0, ge=0, description="exponent of the input variance in the regrowing order")
    overshoot: bool = Field(False, description="swap on when |eps| would grow, as the published code does")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs | weight_method(self.base).statistics

    def score(self, problem: Problem) -> Tensor:
        """That of the base, for a choice across matrices; the swaps keep the count of each row."""
        return weight_method(self.base).score(problem)

    def prune(self, problem: Problem) -> Solution:
        from secateur.weights.swaps import InGroup, InRow, Rows

        start = weight_method(self.base).prune(problem)
        mean, variance = _moments(problem.inputs)
        effect = problem.weight * mean
        rows = Rows(
            effect=effect,
            appeal=effect / variance.pow(self.power),
            importance=problem.weight.abs() * input_norms(problem.inputs),
            kept=start.kept,
        )
        group = problem.pattern.of if problem.pattern.kind == "n:m" else 0
        chooser = InGroup(rows, group) if group else InRow(rows, self.cycles)
        kept, before, after = self._swap(rows, chooser)
        notes = {
            "mean_error_before": float(before.abs().mean()),
            "mean_error_after": float(after.abs().mean()),
        }
        return Solution.of(problem.weight, kept, notes=notes, fallbacks=start.fallbacks)

    def _swap(self, rows: Rows, chooser: InRow | InGroup) -> tuple[Tensor, Tensor, Tensor]:
        """The mask after the swaps, and (out,) eps before and after.

        A regrown weight of positive effect leaves eps smaller, and so does a dropped one of negative
        effect: with eps > 0 the first comes from side 0 and the second from side 1, with eps < 0 the
        other way round.
        """
        import torch

        from secateur.weights.swaps import Queue

        queue = Queue(-rows.appeal.abs(), ~rows.kept, rows.effect, self.cycles)
        row = torch.arange(len(rows.kept), device=rows.kept.device)
        first = eps = (rows.effect * ~rows.kept).sum(1)
        kept, alive = rows.kept.clone(), torch.ones_like(eps, dtype=torch.bool)
        for _ in range(self.cycles):
            side = (eps <= 0).long()
            regrown, left = queue.peek(side)
            dropped, fits = chooser.find(1 - side, regrown)
            after = eps + rows.effect[row, dropped] - rows.effect[row, regrown]
            alive = alive & left & (eps.abs() > self.threshold)
            if not self.overshoot:
                alive = alive & (~fits | (after.abs() < eps.abs()))
            swapped = alive & fits
            queue.advance(side, alive)  # a candidate without a partner is passed over
            chooser.take(1 - side, dropped, swapped)
            kept[row, regrown] |= swapped
            kept[row, dropped] &= ~swapped
            eps = torch.where(swapped, after, eps)
            if not bool(alive.any()):  # nearly all rows end within a few cycles
                break
        return kept, first, eps


def _moments(inputs: InputStatistics) -> tuple[Tensor, Tensor]:
    """(in,) mean over sequences of the token sums, and variance over tokens."""
    if inputs.mean is None or inputs.second_moment is None:
        raise ValueError("mean and second moment were not observed")
    tokens = max(inputs.tokens, 1)
    variance = inputs.second_moment / tokens - (inputs.mean / tokens).square()
    floor = max(float(variance.max()) * 1e-12, 1e-30)  # constant inputs must not divide by zero
    return (inputs.mean / max(inputs.sequences, 1)).float(), variance.clamp_min(floor).float()
