"""How many units go where: the same share everywhere, more where blocks do little, one ranking of all, or the
least total loss.

Counts are exact: what is removed meets the budget to within the cheapest unit, ties go by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.core.errors import RecipeError
from secateur.structure.base import StructureMethod
from secateur.structure.goal import Goal
from secateur.structure.groups import Scored, comparable, floor_of, lowest, removable, step_of
from secateur.structure.knapsack import fewest_losses, parameters_left
from secateur.structure.units import Units

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scored", "allocate"]

TOLERANCE = 0.01


def allocate(
    groups: Sequence[Scored],
    sizes: Sequence[int],
    sparsity: float,
    method: StructureMethod,
    angles: Tensor | None = None,
    *,
    goal: Goal | None = None,
) -> list[Tensor]:
    """Choose what stays.

    Args:
        groups: all units of the model.
        sizes: parameters of each block; `sparsity` is the fraction of their sum that goes.
        method: its `spread`, `min_keep` and `round_to` are respected.
        angles: (L,) how much each block turns the hidden state, for the spread `sigmoid`.
        goal: a limit that is met instead of the sparsity, and never exceeded.

    Returns:
        For each group the units that stay, sorted int64.

    Raises:
        RecipeError: more than can be removed, or no share of heads and channels comes near.
    """

    def spend(budget: float) -> list[Tensor]:
        return _spent(groups, sizes, budget, method, angles)

    if goal is None:
        budget = sparsity * sum(sizes)
        most = sum(removable(group.units, method) * group.units.parameters for group in groups)
        if budget > most:
            raise RecipeError(
                f"sparsity {sparsity:g}",
                f"at most {most / sum(sizes):.3f}: the rest is norms and the {method.min_keep} unit(s) of "
                "each kind that a block keeps",
                "lower --sparsity or min_keep",
            )
        removed = spend(budget)
        _check_reached(groups, removed, sparsity, sum(sizes), method)
    else:
        _check_reachable(goal, [floor_of(group.units, method) for group in groups], method)
        if method.spread == "knapsack":
            removed = fewest_losses(groups, goal, method)
        else:
            removed = _least_spent(groups, goal, spend, sum(sizes))
    return [group.units.others(gone) for gone, group in zip(removed, groups, strict=True)]


def _spent(
    groups: Sequence[Scored],
    sizes: Sequence[int],
    budget: float,
    method: StructureMethod,
    angles: Tensor | None,
) -> list[Tensor]:
    """What goes, by the method's spread, when so many parameters shall go."""
    if method.spread == "global":
        removed = _ranked(groups, budget, method)
        pairs = zip(groups, removed, strict=True)
        return lowest(groups, [_rounded(group.units, len(gone), method) for group, gone in pairs])
    if method.spread == "knapsack":
        return fewest_losses(groups, parameters_left(groups, budget, method), method)
    share = budget / sum(sizes)
    budgets = [share * size for size in sizes]
    if method.spread == "sigmoid":
        assert angles is not None
        budgets = _by_angle(groups, budget, angles.double(), method.sharpness)
    return lowest(groups, _spread(groups, budgets, method))


def _check_reachable(goal: Goal, floors: Sequence[int], method: StructureMethod) -> None:
    least = goal.cost(floors)
    if least > goal.limit:
        raise RecipeError(
            f"a budget of {goal.limit:,.6g} {goal.unit}",
            f"at least {least:,.6g}: what is outside the blocks, norms, and the {method.min_keep} unit(s) of "
            "each kind that a block keeps",
            "raise --budget, or lower min_keep",
        )


def _least_spent(
    groups: Sequence[Scored], goal: Goal, spend: Callable[[float], list[Tensor]], most: int
) -> list[Tensor]:
    """What goes when just as many parameters are to go as the goal needs; at `most` every group is at its
    floor."""

    def met(removed: Sequence[Tensor]) -> bool:
        return goal.met([group.units.count - len(gone) for group, gone in zip(groups, removed, strict=True)])

    enough = spend(most)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        removed = spend(middle)
        if met(removed):
            high, enough = middle, removed
        else:
            low = middle
    return enough


def _check_reached(
    groups: Sequence[Scored], removed: Sequence[Tensor], sparsity: float, total: int, method: StructureMethod
) -> None:
    """Refuse a share that whole units do not come near, where no channels are there to make up for heads."""
    freed = sum(len(gone) * group.units.parameters for group, gone in zip(groups, removed, strict=True))
    near = freed / total
    if any(group.units.kind.endswith("ffn") for group in groups) or abs(near - sparsity) <= TOLERANCE:
        return
    step = min(group.units.parameters for group in groups) / total
    step *= 1 if method.spread == "global" else len({group.block for group in groups})
    others = [near - step, near, near + step]
    raise RecipeError(
        f"sparsity {sparsity:g} of heads alone",
        f"a share that whole heads make: {', '.join(f'{share:.3f}' for share in others if share > 0)}",
        "choose one of these, or add channels: -O targets=all",
    )


def _by_angle(groups: Sequence[Scored], budget: float, angles: Tensor, sharpness: float) -> list[float]:
    """Parameters to remove of each block: it keeps in proportion to the sigmoid of its angle (cfsp, 2.2)."""
    import torch

    blocks = torch.tensor([group.block for group in groups])
    units = torch.tensor([group.units.count * group.units.parameters for group in groups]).double()
    whole = torch.zeros(len(angles), dtype=torch.float64).index_add(0, blocks, units)
    kept = 1 - budget / float(whole.sum())
    share = torch.sigmoid(sharpness * (angles - angles.mean()))
    mean, top = share.mean(), share.max()
    if top / mean * kept >= 1:  # no block keeps more than it has
        share = mean + (share - mean) * (mean * (1 / kept - 1) / (top - mean) / 1.05)
        mean = share.mean()
    return ((1 - share / mean * kept) * whole).tolist()


def _spread(groups: Sequence[Scored], budgets: Sequence[float], method: StructureMethod) -> list[int]:
    """Units to remove of each group: the kinds of a block share its budget in proportion, the coarsest
    first, so that the finest makes up for what rounding left."""
    counts = [0] * len(groups)
    for block, left in enumerate(budgets):
        own = [number for number, group in enumerate(groups) if group.block == block]
        own.sort(key=lambda number: -groups[number].units.parameters)
        while own:
            units = groups[own[0]].units
            whole = sum(groups[number].units.count * groups[number].units.parameters for number in own)
            share = left * units.count / whole
            counts[own[0]] = _rounded(units, share, method)
            left -= counts[own.pop(0)] * units.parameters
    return counts


def _rounded(units: Units, share: float, method: StructureMethod) -> int:
    step = step_of(units, method)
    kept = step * round((units.count - share) / step)
    return min(max(units.count - kept, 0), removable(units, method))


def _ranked(groups: Sequence[Scored], budget: float, method: StructureMethod) -> list[Tensor]:
    """The lowest of all units whose parameters fit into the budget."""
    import torch

    candidates = [
        group.scores.argsort(stable=True)[: removable(group.units, method)].sort().values for group in groups
    ]
    scores = torch.cat(
        [comparable(group.scores, method)[chosen] for group, chosen in zip(groups, candidates, strict=True)]
    )
    owner = torch.cat([torch.full_like(chosen, number) for number, chosen in enumerate(candidates)])
    costs = torch.tensor([group.units.parameters for group in groups])[owner]
    taken = torch.zeros(len(scores), dtype=torch.bool)
    order = scores.argsort(stable=True)
    left = int(budget)
    while len(order):  # what no longer fits is passed over for what does
        fits = costs[order].cumsum(0) <= left
        taken[order[fits]] = True
        left -= int(costs[order[fits]].sum())
        order = order[~fits]
        order = order[costs[order] <= left]
    positions = torch.cat(candidates)
    return [positions[taken & (owner == number)] for number in range(len(groups))]
