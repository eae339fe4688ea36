"""Greedy elimination: units go one batch after the other, and those that stay make up for them each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from secateur.anatomy.units import Units
from secateur.structure.local_search import removal_losses

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Elimination", "eliminate"]


class Elimination(NamedTuple):
    """Attributes:
    order: (count,) int64, units as they go: the removed sets of all ratios are its beginnings.
    losses: (count,) float64, loss at the moment each unit goes, all before it included.
    """

    order: Tensor
    losses: Tensor


def eliminate(
    weight: Tensor,
    hessian: Tensor,
    units: Units,
    *,
    rounds: int,
    damping: float,
    first_order_weight: float = 0.0,
) -> Elimination:
    """Remove one batch of units after the other, the cheapest first (structured-baselines, section 2.5).

    A unit costs 1/2 tr(W_j^T (Hinv_jj)^-1 W_j): exactly what least squares loses without it.

    Args:
        weight: (d, C) of the matrix that collects the units; not changed.
        hessian: (C, C) sum of x x^T.
        rounds: steps of the elimination; with as many as there are units each goes alone.
        damping: fraction of the mean diagonal that is added to the Hessian.
        first_order_weight: of the term tr(W_j^T G_j), G = H W, beside the loss (tyr-the-pruner, section 2.1).

    Returns:
        On the CPU.

    Raises:
        NumericsError: the Hessian is not finite, or singular whatever the damping.
    """
    import torch

    from secateur.core.numerics import damped_cholesky

    factor, used = damped_cholesky(hessian, damping, dtype=torch.float64)
    inverse = torch.cholesky_inverse(factor)
    del factor
    rows = weight.double().T.contiguous()
    target = _damped_product(hessian, rows, used) if first_order_weight else None
    system = _System(rows, inverse, target)
    del rows, inverse, target
    losses = torch.zeros(units.count, dtype=torch.float64)
    alive, order = torch.arange(units.count), []
    step, total = -(-units.count // rounds), 0.0
    while len(alive):
        lost, first = system.costs(units.columns(alive).view(-1, units.width))
        cheapest = (lost + first_order_weight * first).argsort(stable=True)
        now, alive = alive[cheapest[:step]], alive[cheapest[step:]].sort().values
        losses[now] = total + lost[cheapest[:step]].cumsum(0)
        total = float(losses[now[-1]])
        order.append(now)
        if len(alive):
            system.remove(units.columns(now))
            system.shrink(units.columns(alive))
    return Elimination(torch.cat(order), losses)


class _System:
    """Least squares on what is still there: fitted weights, inverse Hessian and G = H W, row by row.

    Columns are numbered as in the weight; `place` says where each lies.
    """

    def __init__(self, rows: Tensor, inverse: Tensor, target: Tensor | None) -> None:
        import torch

        self.rows, self.inverse, self.target = rows, inverse, target
        self.place = torch.arange(len(rows), device=rows.device)

    def costs(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What least squares loses without each group of (n, width) columns, and tr(W_j^T G_j); (n,) each, on
        the CPU."""
        import torch

        at = self.place[columns.to(self.place.device)]
        lost = removal_losses(self.rows, self.inverse, at).cpu()
        if self.target is None:
            return lost, torch.zeros_like(lost)
        return lost, (self.rows[at] * self.target[at]).sum((1, 2)).cpu()

    def remove(self, columns: Tensor) -> None:
        """Refit the others without these, and take them out of the inverse."""
        import torch

        gone = self.place[columns.to(self.place.device)]
        tall = self.inverse[:, gone].clone()
        solved = torch.linalg.solve(tall[gone], tall.T)  # (|P|, C)
        self.rows -= solved.T @ self.rows[gone]
        self.inverse.addmm_(tall, solved, alpha=-1)
        self.rows[gone] = 0
        self.inverse[gone, :] = 0
        self.inverse[:, gone] = 0

    def shrink(self, columns: Tensor) -> None:
        """Let go of all but these, once they are less than half."""
        import torch

        if 2 * len(columns) > len(self.rows):
            return
        columns = columns.to(self.place.device)
        kept = self.place[columns]
        self.rows, self.inverse = self.rows[kept], self.inverse[kept][:, kept]
        if self.target is not None:
            self.target = self.target[kept]
        self.place[columns] = torch.arange(len(kept), device=kept.device)


def _damped_product(hessian: Tensor, rows: Tensor, damping: float) -> Tensor:
    """(C, d) of G = (H + damping) W."""
    exact = hessian.double()
    product: Tensor = exact @ rows + damping * exact.diagonal().mean() * rows
    return product
