"""One level for each group so that the total cost stays within a limit and the total loss is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["least_loss"]

Floats = NDArray[np.float64]

HALVINGS = 200
FINENESS = 1e4
"""The gap as HiGHS sees it, which takes differences of 1e-6 for nothing."""
NODES = 20_000
SAFETY = 1e-6


@dataclass(frozen=True)
class _Answer:
    """A choice of levels, its total loss and its total cost."""

    levels: list[int]
    loss: float
    cost: float


def least_loss(losses: Sequence[Floats], costs: Sequence[Floats], limit: float) -> list[int]:
    """Solve the multiple-choice knapsack.

    A price on cost (bisected) gives a feasible choice and, with weak duality, a bound that no choice beats. A
    level whose priced loss lies further above the best of its group than the gap between the two cannot be in
    an optimal choice; the few that are left go to HiGHS. The result is optimal unless its tree grows beyond
    20,000 nodes; then it is the best that was found. It is the same for the same input.

    Args:
        losses: for each group (levels,), finite or infinite, at least one finite.
        costs: the same shapes, finite.
        limit: on the sum of the costs of the levels chosen.

    Returns:
        The level of each group.

    Raises:
        ValueError: even the cheapest levels exceed the limit.
    """
    if sum(float(group.min()) for group in costs) > limit:
        raise ValueError("the cheapest levels exceed the limit")
    free = _priced(losses, costs, 0.0)
    if free.cost <= limit:
        return free.levels
    price, best, bound = _best_price(losses, costs, limit)
    gap = best.loss - bound
    core = [_within(loss + price * cost, gap) for loss, cost in zip(losses, costs, strict=True)]
    if gap > 0 and any(len(levels) > 1 for levels in core):
        better = _solve(losses, costs, core, limit, gap)
        best = better if better is not None and better.loss < best.loss else best
    return best.levels


def _priced(losses: Sequence[Floats], costs: Sequence[Floats], price: float) -> _Answer:
    """The best level of each group by itself; of equal ones the cheapest."""
    levels = []
    for loss, cost in zip(losses, costs, strict=True):
        total = loss + price * cost
        ties = np.flatnonzero(total == total.min())
        levels.append(int(ties[cost[ties].argmin()]))
    return _answer(losses, costs, levels)


def _answer(losses: Sequence[Floats], costs: Sequence[Floats], levels: list[int]) -> _Answer:
    loss = sum(float(own[level]) for own, level in zip(losses, levels, strict=True))
    cost = sum(float(own[level]) for own, level in zip(costs, levels, strict=True))
    return _Answer(levels, loss, cost)


def _best_price(
    losses: Sequence[Floats], costs: Sequence[Floats], limit: float
) -> tuple[float, _Answer, float]:
    """The price with the highest bound, the best feasible choice met on the way, and that bound."""
    low, high = 0.0, 1.0
    while _priced(losses, costs, high).cost > limit and high < 1e300:
        low, high = high, 2 * high
    best, price, bound = _priced(losses, costs, high), high, -np.inf
    if best.cost > limit:  # infinite losses stand in the way of any price
        return 0.0, _answer(losses, costs, [int(cost.argmin()) for cost in costs]), -np.inf
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        found = _priced(losses, costs, middle)
        dual = found.loss + middle * (found.cost - limit)
        if dual > bound:
            price, bound = middle, dual
        if found.cost <= limit:
            high = middle
            best = found if found.loss < best.loss else best
        else:
            low = middle
    return price, best, float(bound)


def _within(total: Floats, gap: float) -> NDArray[np.intp]:
    slack = gap + 1e-9 * abs(gap)
    return np.flatnonzero(total - total.min() <= slack)


def _solve(
    losses: Sequence[Floats],
    costs: Sequence[Floats],
    core: Sequence[NDArray[np.intp]],
    limit: float,
    gap: float,
) -> _Answer | None:
    """The best choice among the levels of the core; None where none was found within the nodes."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    owner = np.repeat(np.arange(len(core)), [len(levels) for levels in core])
    loss = np.concatenate([own[levels] - own[levels].min() for own, levels in zip(losses, core, strict=True)])
    cost = np.concatenate([own[levels] - own[levels].min() for own, levels in zip(costs, core, strict=True)])
    room = limit - sum(float(own[levels].min()) for own, levels in zip(costs, core, strict=True))
    unit = float(cost.max()) or 1.0
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    for tolerance in (0.0, SAFETY, 10 * SAFETY):  # HiGHS accepts a constraint that is missed by very little
        found = milp(
            loss * (FINENESS / gap),
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None] / unit, -np.inf, room / unit - tolerance),
            ],
            options={"node_limit": NODES, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        picked = [int(levels[found.x[owner == group].argmax()]) for group, levels in enumerate(core)]
        answer = _answer(losses, costs, picked)
        if answer.cost <= limit:
            return answer
    return None
