"""ALPS: the whole matrix at once, support and values, by the alternating direction method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.pattern import Pattern
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, Solution, WeightMethod, register

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.weights.least_squares import ScaledGram

__all__ = ["Alps"]

PERIOD = 3
"""Iterations between two looks at the support."""
SETTLED = 3e-4
"""Share of the support that may still change when the search ends, after `PATIENCE` iterations."""
PATIENCE = 30


@register
class Alps(WeightMethod):
    """min ||X (W - D)||^2 over D with the wanted support, by ADMM and then conjugate gradients
    (one-shot-baselines, section 2.7).

    One eigendecomposition of the scaled Gram matrix serves all penalties, and all matrices that share the
    input.
    """

    id: ClassVar[str] = "alps"
    paper: ClassVar[Paper | None] = Paper(
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        2024,
        "2406.07831",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")

    rho: float = Field(0.1, gt=0, description="first penalty of the ADMM")
    iterations: int = Field(300, ge=1, description="most ADMM iterations")
    damping: float = Field(0.01, gt=0, le=1, description="fraction of the mean diagonal added to it")
    pcg_steps: int = Field(10, ge=0, description="conjugate gradient steps on the final support")

    def prune(self, problem: Problem) -> Solution:
        import torch

        from secateur.core.numerics import exact_products
        from secateur.core.selection import drop_count
        from secateur.core.support import solve_on_support
        from secateur.weights.least_squares import scaled_gram

        weight, pattern = problem.weight, problem.pattern
        if pattern.kind != "n:m" and drop_count(weight.numel(), problem.sparsity) == 0:
            return Solution(weight.clone(), torch.ones_like(weight, dtype=torch.bool))
        with exact_products():
            gram = scaled_gram(problem.inputs, self.damping)
            target = weight * gram.scale
            values, kept, iterations = self._search(problem, gram, target)
            values, steps = solve_on_support(gram.matrix, target, values, kept, self.pcg_steps)
        notes = {"iterations": float(iterations), "pcg_steps": float(steps)}
        return Solution.of(values / gram.scale, kept, notes=notes)

    def _search(self, problem: Problem, gram: ScaledGram, target: Tensor) -> tuple[Tensor, Tensor, int]:
        """ADMM: the projected values, their support and the iterations it took.

        B minimises the quadratic with penalty rho, D is its projection, V the scaled disagreement;
        everything is (out, in), so that N:M groups lie along the last dimension.
        """
        import torch

        product = target @ gram.matrix
        penalty = _Penalty(self.rho)
        inverse = gram.inverse(penalty.rho)
        D, V = target, torch.zeros_like(target)
        support = _project(target, problem)
        for step in range(1, self.iterations + 1):
            B = torch.sub(product, V).add_(D, alpha=penalty.rho) @ inverse
            shifted = torch.add(B, V, alpha=1 / penalty.rho)
            kept = _project(shifted, problem)
            D = shifted * kept
            V.add_(B, alpha=penalty.rho).sub_(D, alpha=penalty.rho)
            if step % PERIOD:
                continue
            changes, size = int((kept ^ support).sum()), max(int(kept.sum()), 1)
            support = kept
            if penalty.finished(changes, size, step):
                break
            if penalty.update(changes, size):
                D, V = target, torch.zeros_like(target)
            inverse = gram.inverse(penalty.rho)
        return D * kept, kept, step


@dataclass
class _Penalty:
    """The schedule of rho: up while the support moves, down until it begins to."""

    rho: float
    raised: bool = False

    def finished(self, changes: int, size: int, step: int) -> bool:
        return (self.raised and changes == 0) or (step >= PATIENCE and changes < SETTLED * size)

    def update(self, changes: int, size: int) -> bool:
        """Move rho; True if the search must start again from the dense weights."""
        share = changes / size
        if share > 0.005:
            self.rho *= 1.3 if share > 0.1 else 1.2
            self.raised = True
        elif self.raised:
            self.rho *= 1.1
        else:
            self.rho /= 5
            return changes > 0
        return False


def _project(values: Tensor, problem: Problem) -> Tensor:
    from secateur.core.selection import select

    return select(values.abs(), problem.pattern, problem.sparsity, name=problem.name)
