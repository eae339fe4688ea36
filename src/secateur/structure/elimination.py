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

    factor, used = damped_cholesky(hessian.double(), damping)
    inverse = torch.cholesky_inverse(factor)
    rows = weight.double().T.contiguous()  # (C, d)
    target = _damped_product(hessian, rows, used) if first_order_weight else None
    losses = torch.zeros(units.count, dtype=torch.float64)
    alive, order = torch.arange(units.count), []
    step, total = -(-units.count // rounds), 0.0
    while len(alive):
        columns = units.columns(alive).view(-1, units.width).to(rows.device)
        lost = removal_losses(rows, inverse, columns)
        costs = lost if target is None else lost + first_order_weight * (rows * target)[columns].sum((1, 2))
        cheapest = costs.cpu().argsort(stable=True)
        now, alive = alive[cheapest[:step]], alive[cheapest[step:]].sort().values
        losses[now] = total + lost.cpu()[cheapest[:step]].cumsum(0)
        total = float(losses[now[-1]])
        order.append(now)
        if len(alive):
            _remove(rows, inverse, units.columns(now).to(rows.device))
    return Elimination(torch.cat(order), losses)


def _damped_product(hessian: Tensor, rows: Tensor, damping: float) -> Tensor:
    """(C, d) of G = (H + damping) W."""
    exact = hessian.double()
    product: Tensor = exact @ rows + damping * exact.diagonal().mean() * rows
    return product


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
