"""How many units go where: the same share everywhere, more where blocks do little, one ranking of all, or the
least total loss.

Counts are exact: what is removed meets the budget to within the cheapest unit, ties go by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from secateur.anatomy.units import Units
from secateur.core.errors import RecipeError
from secateur.core.goal import Goal, fewest
from secateur.structure.base import StructureMethod, UnitMethod
from secateur.structure.groups import Scored, comparable, floor_of, lowest, removable, step_of
from secateur.structure.knapsack import fewest_losses, parameters_left

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scored", "affordable", "allocate", "require_reached", "require_room"]

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
        groups: all units of the model that may go; blocks without any are left whole.
        sizes: parameters of each block; `sparsity` is the fraction of their sum that goes.
        method: its `spread`, `remove_heads`, `min_keep` and `round_to` are respected.
        angles: (L,) how much each block changes the hidden state, for the spread `sigmoid`.
        goal: a limit that is met instead of the sparsity, and never exceeded.

    Returns:
        For each group the units that stay, sorted int64.

    Raises:
        RecipeError: more than can be removed, or no share of heads and channels comes near.
    """

    def spend(budget: float) -> list[Tensor]:
        return _spent(groups, sizes, budget, method, angles)

    if goal is None:
        most = sum(removable(group.units, method) * group.units.parameters for group in groups)
        require_room(most, sparsity, sum(sizes), method)
        removed = spend(sparsity * sum(sizes))
        _check_reached(groups, [len(gone) for gone in removed], sparsity, sum(sizes), method)
    else:
        goal.require_reachable(
            [floor_of(group.units, method) for group in groups],
            f"what is outside the blocks, norms, and the {method.min_keep} unit(s) of each kind that a block "
            "keeps",
            "raise --budget, or lower min_keep",
        )
        if method.spread == "knapsack" and method.remove_heads is None:
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
    """What goes when so many parameters shall go: heads in their own number where one is given, and the rest
    by the method's spread."""
    blocks = dict.fromkeys(group.block for group in groups)
    share = budget / sum(sizes[block] for block in blocks)
    budgets = {block: share * sizes[block] for block in blocks}
    removed: list[Tensor] = [group.scores.new_empty(0).long() for group in groups]
    rest = list(range(len(groups)))
    if method.remove_heads is not None:
        rest = [number for number in rest if groups[number].units.kind.endswith("ffn")]
        heads = [number for number in range(len(groups)) if number not in rest]
        for number, gone in zip(heads, _heads([groups[n] for n in heads], method), strict=True):
            removed[number] = gone
            budgets[groups[number].block] -= len(gone) * groups[number].units.parameters
    chosen = _chosen([groups[number] for number in rest], budgets, method, angles) if rest else []
    for number, gone in zip(rest, chosen, strict=True):
        removed[number] = gone
    return removed


def _chosen(
    groups: Sequence[Scored], budgets: Mapping[int, float], method: StructureMethod, angles: Tensor | None
) -> list[Tensor]:
    """The units that go, of these groups; budgets are parameters of each block."""
    budget = sum(budgets.values())
    if method.spread == "global":
        removed = _ranked(groups, budget, method, [group.units.parameters for group in groups])
        wanted: list[float] = [len(gone) for gone in removed]
    elif method.spread == "knapsack":
        return fewest_losses(groups, parameters_left(groups, budget, method), method)
    else:
        if method.spread == "sigmoid":
            assert angles is not None
            budgets = _by_angle(groups, budget, angles.double(), method.sharpness)
        wanted = _shares(groups, budgets, method)
    pairs = list(zip(groups, wanted, strict=True))
    counts = [_rounded(group.units, share, method) for group, share in pairs]
    if method.spread == "sigmoid" or (method.spread == "global" and method.round_to > 1):
        counts = _balanced(groups, wanted, counts, budget, method)
    return lowest(groups, counts)


def _heads(groups: Sequence[Scored], method: StructureMethod) -> list[Tensor]:
    """`method.remove_heads` of all heads: the same number in every block, or the lowest of one ranking
    (flap, section 2.3: UL-MM and AL-MM)."""
    total, most = method.remove_heads or 0, sum(removable(group.units, method) for group in groups)
    if not groups:
        raise RecipeError(
            f"remove_heads {total} with targets {method.targets}", "heads to remove", "leave remove_heads out"
        )
    if total > most:
        raise RecipeError(f"remove_heads {total}", f"at most {most}", "lower it or min_keep")
    if method.spread == "global":
        return _ranked(groups, total, method, [1] * len(groups))
    blocks = len({group.block for group in groups})
    if total % blocks:
        near = total // blocks * blocks
        raise RecipeError(
            f"remove_heads {total} with spread {method.spread} on {blocks} blocks",
            f"a multiple of {blocks}",
            f"choose {near} or {near + blocks}, or spread=global",
        )
    return lowest(groups, [min(total // blocks, removable(group.units, method)) for group in groups])


def _least_spent(
    groups: Sequence[Scored], goal: Goal, spend: Callable[[float], list[Tensor]], most: int
) -> list[Tensor]:
    """What goes when just as many parameters are to go as the goal needs; at `most` every group is at its
    floor."""

    def met(removed: Sequence[Tensor]) -> bool:
        return goal.met([group.units.count - len(gone) for group, gone in zip(groups, removed, strict=True)])

    return spend(fewest(lambda budget: met(spend(budget)), most))


def _check_reached(
    groups: Sequence[Scored], counts: Sequence[int], sparsity: float, total: int, method: StructureMethod
) -> None:
    if method.remove_heads is None:
        alone = method.spread in ("global", "knapsack")
        together = 1 if alone else len({group.block for group in groups})
        require_reached(groups, counts, sparsity, total, together)
        return
    near = _freed(groups, counts) / total
    if abs(near - sparsity) > TOLERANCE:
        raise RecipeError(
            f"remove_heads {method.remove_heads} at sparsity {sparsity:g}",
            f"a number with which channels can meet it: this comes to {near:.3f}",
            "lower or raise remove_heads",
        )


def _freed(groups: Sequence[Scored], counts: Sequence[int]) -> int:
    return sum(count * group.units.parameters for group, count in zip(groups, counts, strict=True))


def require_room(most: int, sparsity: float, total: int, method: UnitMethod) -> None:
    """Refuse more than the units hold that may go. Raises `RecipeError`."""
    if sparsity * total > most:
        raise RecipeError(
            f"sparsity {sparsity:g}",
            f"at most {most / total:.3f}: the rest is norms, routed experts if there are any, the "
            f"{method.min_keep} unit(s) of each kind that a block keeps, and blocks left whole",
            "lower --sparsity or min_keep, or remove whole experts: --method reap",
        )


def require_reached(
    groups: Sequence[Scored], counts: Sequence[int], sparsity: float, total: int, together: int
) -> None:
    """Refuse a share that whole units do not come near, where no channels are there to make up for heads.

    Args:
        counts: units that go of each group.
        total: parameters that `sparsity` is a fraction of.
        together: blocks that lose units at the same time.

    Raises:
        RecipeError: with shares that whole units do make.
    """
    near = _freed(groups, counts) / total
    if any(group.units.kind.endswith("ffn") for group in groups) or abs(near - sparsity) <= TOLERANCE:
        return
    step = together * min(group.units.parameters for group in groups) / total
    others = [near - step, near, near + step]
    raise RecipeError(
        f"sparsity {sparsity:g} of heads alone",
        f"a share that whole heads make: {', '.join(f'{share:.3f}' for share in others if share > 0)}",
        "choose one of these, or add channels: -O targets=all",
    )


def _by_angle(groups: Sequence[Scored], budget: float, angles: Tensor, sharpness: float) -> dict[int, float]:
    """Parameters to remove of each block: it keeps in proportion to the sigmoid of its angle (cfsp, 2.2)."""
    import torch

    blocks = torch.tensor([group.block for group in groups])
    units = torch.tensor([group.units.count * group.units.parameters for group in groups]).double()
    whole = torch.zeros(len(angles), dtype=torch.float64).index_add(0, blocks, units)
    present = torch.unique(blocks)
    whole, angles = whole[present], angles[present]
    kept = 1 - budget / float(whole.sum())
    share = torch.sigmoid(sharpness * (angles - angles.mean()))
    mean, top = share.mean(), share.max()
    if top / mean * kept >= 1:  # no block keeps more than it has
        share = mean + (share - mean) * (mean * (1 / kept - 1) / (top - mean) / 1.05)
        mean = share.mean()
    return dict(zip(present.tolist(), ((1 - share / mean * kept) * whole).tolist(), strict=True))


def _shares(groups: Sequence[Scored], budgets: Mapping[int, float], method: StructureMethod) -> list[float]:
    """Units to remove of each group: the kinds of a block share its budget in proportion, the coarsest
    first, so that the finest makes up for what rounding left."""
    shares = [0.0] * len(groups)
    for block, left in budgets.items():
        own = [number for number, group in enumerate(groups) if group.block == block]
        own.sort(key=lambda number: -groups[number].units.parameters)
        while own:
            units = groups[own[0]].units
            whole = sum(groups[number].units.count * groups[number].units.parameters for number in own)
            share = left * units.count / whole
            shares[own[0]] = share
            left -= _rounded(units, share, method) * units.parameters
            own.pop(0)
    return shares


def _balanced(
    groups: Sequence[Scored],
    wanted: Sequence[float],
    counts: Sequence[int],
    budget: float,
    method: StructureMethod,
) -> list[int]:
    """Counts that meet the budget to within half a step of `round_to`: one width after the other moves to its
    next multiple, first the one that comes closest to what was wanted (cfsp, section 5)."""
    counts = list(counts)
    while True:
        excess = sum(n * group.units.parameters for n, group in zip(counts, groups, strict=True)) - budget
        moves = [
            (abs(wanted[number] - to), number, to)
            for number, group in enumerate(groups)
            if (to := _next(group.units, counts[number], excess > 0, method)) is not None
            and abs(excess + (to - counts[number]) * group.units.parameters) < abs(excess)
        ]
        if not moves:
            return counts
        _, number, to = min(moves)
        counts[number] = to


def _next(units: Units, count: int, fewer: bool, method: StructureMethod) -> int | None:
    """What is removed with the next legal width above or below; None where there is none."""
    if not units.kind.endswith("ffn"):
        return None
    kept, step = units.count - count, step_of(units, method)
    to = min(kept // step * step + step, units.count) if fewer else (kept - 1) // step * step
    removed = units.count - to
    return removed if removed != count and to > 0 and removed <= removable(units, method) else None


def _rounded(units: Units, share: float, method: StructureMethod) -> int:
    step = step_of(units, method)
    kept = step * round((units.count - share) / step)
    return min(max(units.count - kept, 0), removable(units, method))


def _ranked(
    groups: Sequence[Scored], budget: float, method: StructureMethod, prices: Sequence[int]
) -> list[Tensor]:
    """The lowest of all units whose prices, one a unit of each group, fit into the budget."""
    import torch

    candidates = [
        group.scores.argsort(stable=True)[: removable(group.units, method)].sort().values for group in groups
    ]
    scores = torch.cat(
        [comparable(group.scores, method)[chosen] for group, chosen in zip(groups, candidates, strict=True)]
    )
    owner = torch.cat([torch.full_like(chosen, number) for number, chosen in enumerate(candidates)])
    costs = torch.tensor(prices)[owner]
    taken = affordable(costs, scores.argsort(stable=True), int(budget))
    positions = torch.cat(candidates)
    return [positions[taken & (owner == number)] for number in range(len(groups))]


def affordable(costs: Tensor, order: Tensor, budget: int) -> Tensor:
    """Which of the items, int64 `costs`, fit into the budget when taken in this order; what no longer fits is
    passed over for what does. Bool, (n,)."""
    import torch

    taken = torch.zeros(len(costs), dtype=torch.bool)
    while len(order):
        fits = costs[order].cumsum(0) <= budget
        taken[order[fits]] = True
        budget -= int(costs[order[fits]].sum())
        order = order[~fits]
        order = order[costs[order] <= budget]
    return taken
