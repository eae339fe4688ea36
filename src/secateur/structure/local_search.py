"""Swapping units that stay for units that go, where least squares then loses less (structured-baselines,
section 2.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.structure.compensation import DAMPING

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.structure.base import UnitProblem

__all__ = ["improved", "removal_losses"]


def improved(problem: UnitProblem, kept: Tensor, swaps: int, rounds: int) -> Tensor:
    """As many units, after refitting on which the loss is no higher.

    A round drops the `swaps` units that cost least and takes back as many that gain most. Where that is no
    better the next round swaps half as many.

    Args:
        problem: with a Hessian.
        kept: units that stay, sorted int64.
        swaps: units exchanged at once in the first round.
        rounds: at most.

    Returns:
        Units that stay, sorted int64.
    """
    import torch

    from secateur.core.numerics import damped_cholesky, exact_products

    assert problem.inputs.hessian is not None
    hessian = problem.inputs.hessian.double()
    with exact_products():
        _, used = damped_cholesky(hessian, DAMPING)
        hessian = hessian + torch.diag(
            torch.full_like(hessian.diagonal(), used * float(hessian.diagonal().mean()))
        )
        search = _Search(problem, hessian)
        best = search.explained(kept)
        for _ in range(rounds):
            swaps = min(swaps, len(kept) - 1, problem.units.count - len(kept))
            if swaps < 1:
                break
            trial = search.swapped(kept, swaps)
            now = search.explained(trial)
            if now > best:
                kept, best = trial, now
            else:
                swaps //= 2
    return kept


class _Search:
    """Least squares on some of the units: H is the Hessian, G = H W^T what they are to give, (C, d)."""

    def __init__(self, problem: UnitProblem, hessian: Tensor) -> None:
        self.units, self.hessian = problem.units, hessian
        self.target = hessian @ problem.weight.double().T

    def explained(self, kept: Tensor) -> float:
        """1/2 tr(G_S^T H_SS^-1 G_S): the loss is a constant minus this."""
        columns = self.units.columns(kept)
        target = self.target[columns]
        return float((target * self._solve(columns, target)).sum()) / 2

    def swapped(self, kept: Tensor, swaps: int) -> Tensor:
        """Without the units that cost least, with those that then gain most."""
        import torch

        columns = self.units.columns(kept)
        inverse = self._solve(
            columns, torch.eye(len(columns), dtype=torch.float64, device=self.hessian.device)
        )
        groups = torch.arange(len(columns), device=inverse.device).view(len(kept), -1)
        costs = removal_losses(inverse @ self.target[columns], inverse, groups)
        rest = kept[costs.argsort(stable=True)[swaps:].sort().values.cpu()]
        outside = self.units.others(rest)
        best = self._gains(rest, outside).argsort(descending=True, stable=True)[:swaps]
        return torch.cat([rest, outside[best.cpu()]]).sort().values

    def _gains(self, rest: Tensor, outside: Tensor) -> Tensor:
        """(n,) of 1/2 tr(g_j^T C_j^-1 g_j), g and C what `rest` leaves of G and H."""
        import torch

        inside, columns = self.units.columns(rest), self.units.columns(outside)
        across = self.hessian[inside][:, columns]
        solved = self._solve(inside, across)
        left = (self.target[columns] - solved.T @ self.target[inside]).view(
            len(outside), self.units.width, -1
        )
        groups = columns.view(len(outside), -1)
        own = self.hessian[groups[:, :, None], groups[:, None, :]]
        blocks = (len(across), len(outside), self.units.width)
        own = own - torch.einsum("rni,rnj->nij", across.view(blocks), solved.view(blocks))
        return _halves(own, left)

    def _solve(self, columns: Tensor, right: Tensor) -> Tensor:
        import torch

        factor = torch.linalg.cholesky(self.hessian[columns][:, columns])
        return torch.cholesky_solve(right, factor)


def removal_losses(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """(n,) of 1/2 tr(W_j^T (Hinv_jj)^-1 W_j): what least squares loses when a group of rows goes.

    Args:
        weight: (C, d) weights fitted on all that is there.
        inverse: (C, C) of the Hessian.
        columns: (n, width) int64.
    """
    own = inverse[columns[:, :, None], columns[:, None, :]]
    return _halves(own, weight[columns])


def _halves(matrices: Tensor, rows: Tensor) -> Tensor:
    """(n,) of 1/2 tr(R^T M^-1 R) for M (n, width, width) and R (n, width, d)."""
    import torch

    solved: Tensor = torch.linalg.solve(matrices, rows)
    return 0.5 * (rows * solved).sum((1, 2))
