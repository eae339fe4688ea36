"""SparseGPT: the weights that stay make up for those that go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.pattern import Pattern
from secateur.core.statistics import Statistic
from secateur.weights.base import OtherMethod, Problem, Solution, WeightMethod, register, weight_method

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.weights.obs import Choose

__all__ = ["SparseGPT", "hessian_fallbacks"]

PANEL = 32
"""Columns that go one by one between two products; any width gives the same result."""


@register
class SparseGPT(WeightMethod):
    """Optimal brain surgeon, column by column (one-shot-baselines, section 2.4).

    The comparison group is published as all rows times `blocksize` columns, chosen when the sweep reaches
    them; `matrix` means that, and `row` the same count in every row of the block. Either way the counts
    of the blocks add up to the exact count of the matrix or row. N:M groups are chosen as the sweep
    reaches them. Inputs that were never active do not lose their weights by rule, as published, but
    compete with the damping as their only curvature.
    """

    id: ClassVar[str] = "sparsegpt"
    paper: ClassVar[Paper | None] = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, "2301.00774"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")

    blocksize: int = Field(128, ge=1, description="columns chosen together")
    damping: float = Field(0.01, ge=0, le=1, description="fraction of the mean diagonal added to it")
    mask: OtherMethod = Field("", description="method that chooses what goes; empty: SparseGPT itself")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs | weight_method(self.mask).statistics if self.mask else self.needs

    def score(self, problem: Problem) -> Tensor:
        """W^2 / U_jj^2 before any update, for a choice across matrices."""
        from secateur.core.sweep import hessian_factor

        factor, _ = hessian_factor(problem.inputs, self.damping)
        return (problem.weight * factor.diagonal()).square()

    def prune(self, problem: Problem) -> Solution:
        from secateur.core.sweep import hessian_factor, sweep
        from secateur.weights.obs import Removal

        chosen = weight_method(self.mask).prune(problem) if self.mask else None
        factor, damping = hessian_factor(problem.inputs, self.damping)
        widths, level = self._spans(problem.pattern)
        rule = Removal(problem.weight, _chooser(problem, chosen.kept if chosen else None))
        weight, loss = sweep(problem.weight, factor, rule, widths=widths, level=level)
        kept = rule.kept.T.contiguous()
        # the published Hessian is 2/s times the sum over tokens, its loss e^2/2
        notes = {"obs_loss": float(loss) / max(problem.inputs.sequences, 1)}
        fallbacks = hessian_fallbacks(problem, self.damping, damping)
        return Solution(weight, kept, notes, fallbacks + (chosen.fallbacks if chosen else []))

    def _spans(self, pattern: Pattern) -> tuple[list[int], int]:
        """Nested widths of the sweep, and the level at which columns are chosen."""
        if pattern.kind != "n:m":
            return [self.blocksize, PANEL], 0
        block = max(self.blocksize // pattern.of, 1) * pattern.of
        widths = [block, pattern.of] if PANEL % pattern.of else [block, PANEL, pattern.of]
        return widths, len(widths) - 1


def hessian_fallbacks(problem: Problem, asked: float, used: float) -> list[str]:
    """What a report must say about the Hessian of this matrix."""
    fallbacks = []
    if used > asked:
        fallbacks.append(f"damping raised from {asked:g} to {used:g} of the mean diagonal: singular Hessian")
    assert problem.inputs.hessian is not None
    silent = int((problem.inputs.hessian.diagonal() <= 0).sum())
    if silent:
        fallbacks.append(
            f"{silent} of {problem.inputs.columns} inputs were always zero: "
            "their weights compete by magnitude and change only if dropped"
        )
    return fallbacks


def _chooser(problem: Problem, kept: Tensor | None) -> Choose:
    """How the weights of some columns are chosen, given (out, width) scores."""
    from secateur.core.selection import drop_count, drop_smallest, select_groups

    pattern, rows = problem.pattern, problem.weight.shape[0]
    if kept is not None:
        return lambda scores, span: kept[:, span]
    if pattern.kind == "n:m":
        return lambda scores, span: select_groups(scores, pattern)
    size = 1 if pattern.kind == "row" else rows

    def choose(scores: Tensor, span: slice) -> Tensor:
        # differences of a running total: the blocks add up to it without drift
        before, after = (drop_count(size * column, problem.sparsity) for column in (span.start, span.stop))
        count = after - before
        if pattern.kind == "row":
            return drop_smallest(scores, count)
        return drop_smallest(scores.flatten(), count).view(scores.shape)

    return choose
