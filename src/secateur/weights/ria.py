"""RIA: how much of its row and of its column a weight is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.pattern import InputOrder, Pattern
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, Solution, WeightMethod, input_norms, register

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.anatomy.permute import Reorder

__all__ = ["Ria"]


@register
class Ria(WeightMethod):
    """Score (|W|/column sum + |W|/row sum) * sqrt(a_j)^a, compared within the matrix
    (one-shot-baselines, section 2.5).

    With an N:M pattern, `permutation` chooses the groups among reordered inputs. The order must be folded
    into the producers of the inputs; where the caller cannot do that, the stored order is used and said.
    """

    id: ClassVar[str] = "ria"
    paper: ClassVar[Paper | None] = Paper(
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", 2024
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")

    a: float = Field(0.5, ge=0, description="exponent of the input norm")
    permutation: InputOrder = Field("none", description="order of the inputs for N:M, where it can be folded")

    def score(self, problem: Problem) -> Tensor:
        magnitude = problem.weight.abs()
        tiny = 1e-30  # a row or column of zeros has no importance instead of an undefined one
        by_column = magnitude.sum(0).clamp_min(tiny).reciprocal()
        by_row = magnitude.sum(1, keepdim=True).clamp_min(tiny).reciprocal()
        return magnitude * (by_column + by_row) * input_norms(problem.inputs) ** self.a

    def prune(self, problem: Problem) -> Solution:
        if self.permutation == "none" or problem.pattern.kind != "n:m":
            return super().prune(problem)
        if problem.reorder is None or problem.reorder.width % problem.pattern.of:
            solution = super().prune(problem)
            solution.fallbacks.append(
                "inputs left in their stored order: another one cannot be folded into what produces them"
            )
            return solution
        return self._prune_permuted(problem, problem.reorder)

    def _prune_permuted(self, problem: Problem, reorder: Reorder) -> Solution:
        import torch

        from secateur.core.selection import select_groups
        from secateur.weights.permutation import best_permutation

        scores = self.score(problem)
        parts = scores.view(-1, reorder.parts, reorder.together, reorder.width).transpose(1, 2).flatten(0, 1)
        orders = torch.stack(
            [best_permutation(part, problem.pattern, self.permutation) for part in parts.unbind(1)]
        )
        order = reorder.columns(orders)
        kept = select_groups(scores[:, order], problem.pattern)[:, order.argsort()]
        return Solution.of(problem.weight, kept, orders=orders)
