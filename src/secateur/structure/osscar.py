"""OSSCAR: remove what the rest can make up for, and let it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import Compensation, Losses, StructureMethod, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Osscar"]


@register
class Osscar(StructureMethod):
    """Exact increase of the least-squares loss when a unit goes and the others are refitted, greedily
    (structured-baselines, section 2.5).

    A unit's score is the loss at the moment greedy elimination reaches it, so that the removed sets of all
    ratios are nested and one pass serves them all. The paper's local search over swaps is left out.
    """

    id: ClassVar[str] = "osscar"
    paper: ClassVar[Paper | None] = Paper(
        "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization",
        2024,
        "2403.12983",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    losses: ClassVar[Losses] = "total"

    compensate: Compensation = Field(
        "least_squares", description="none, bias (mean output) or least_squares (refit on what stays)"
    )
    rounds: int = Field(64, ge=1, description="steps of the elimination; more are slower and more exact")
    damping: float = Field(1e-2, gt=0, description="fraction of the mean diagonal added to the Hessian")

    def score(self, problem: UnitProblem) -> Tensor:
        import torch

        from secateur.core.numerics import damped_cholesky

        units, width = problem.units, problem.units.width
        assert problem.inputs.hessian is not None
        factor, _ = damped_cholesky(problem.inputs.hessian.double(), self.damping)
        inverse = torch.cholesky_inverse(factor)
        weight = problem.weight.double().T.contiguous()  # (C, d)
        scores = torch.full((units.count,), torch.inf, dtype=torch.float64)
        alive = torch.arange(units.count)
        step, total = -(-units.count // self.rounds), 0.0
        while len(alive):
            losses = _losses(weight, inverse, units.columns(alive).view(-1, width))
            order = losses.argsort(stable=True)
            now, alive = alive[order[:step]], alive[order[step:]].sort().values
            scores[now] = total + losses[order[:step]].cumsum(0)
            total = float(scores[now[-1]])
            if len(alive):
                _remove(weight, inverse, units.columns(now))
        return scores


def _losses(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """(n,) of 1/2 tr(W_j^T (Hinv_jj)^-1 W_j) for the column groups (n, width)."""
    import torch

    own = inverse[columns[:, :, None], columns[:, None, :]]
    rows = weight[columns]
    solved: Tensor = torch.linalg.solve(own, rows)
    return 0.5 * (rows * solved).sum((1, 2))


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Refit what stays without these columns, and take them out of the inverse; in place."""
    import torch

    tall = inverse[:, gone].clone()
    solved = torch.linalg.solve(tall[gone], tall.T)  # (|P|, C)
    weight -= solved.T @ weight[gone]
    inverse -= tall @ solved
    weight[gone] = 0
    inverse[gone, :] = 0
    inverse[:, gone] = 0
