"""How many units go where: the same share everywhere, more where blocks do little, or one ranking of all.

Counts are exact: what is removed meets the budget to within the cheapest unit, ties go by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.core.errors import RecipeError
from secateur.structure.base import StructureMethod, UnitMethod
from secateur.structure.units import Units

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scored", "affordable", "allocate", "require_reached", "require_room"]

TOLERANCE = 0.01


@dataclass(frozen=True)
class Scored:
    """The units of one kind in one block with their importance, (count,)."""

    block: int
    units: Units
    scores: Tensor


def allocate(
    groups: Sequence[Scored],
    sizes: Sequence[int],
    sparsity: float,
    method: StructureMethod,
    angles: Tensor | None = None,
) -> list[Tensor]:
    """Choose what stays.

    Args:
        groups: all units of the model that may go; blocks without any are left whole.
        sizes: parameters of each block; `sparsity` is the fraction of their sum that goes.
        method: its `spread`, `min_keep` and `round_to` are respected.
        angles: (L,) how much each block turns the hidden state, for the spread `sigmoid`.

    Returns:
        For each group the units that stay, sorted int64.

    Raises:
        RecipeError: more than can be removed, or no share of heads and channels comes near.
    """
    budget = sparsity * sum(sizes)
    most = sum(_removable(group.units, method) * group.units.parameters for group in groups)
    require_room(most, sparsity, sum(sizes), method)
    if method.spread == "global":
        removed = _ranked(groups, budget, method)
        pairs = zip(groups, removed, strict=True)
        removed = _lowest(groups, [_rounded(group.units, len(gone), method) for group, gone in pairs])
    else:
        blocks = dict.fromkeys(group.block for group in groups)
        share = sparsity * (sum(sizes) / sum(sizes[block] for block in blocks))
        budgets = {block: share * sizes[block] for block in blocks}
        if method.spread == "sigmoid":
            assert angles is not None
            budgets = _by_angle(groups, budget, angles.double(), method.sharpness)
        removed = _lowest(groups, _spread(groups, budgets, method))
    together = 1 if method.spread == "global" else len({group.block for group in groups})
    require_reached(groups, [len(gone) for gone in removed], sparsity, sum(sizes), together)
    return [group.units.others(gone) for gone, group in zip(removed, groups, strict=True)]


def require_room(most: int, sparsity: float, total: int, method: UnitMethod) -> None:
    """Refuse more than the units hold that may go. Raises `RecipeError`."""
    if sparsity * total > most:
        raise RecipeError(
            f"sparsity {sparsity:g}",
            f"at most {most / total:.3f}: the rest is norms, the {method.min_keep} unit(s) of each "
            "kind that a block keeps, and blocks left whole",
            "lower --sparsity or min_keep",
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
    freed = sum(count * group.units.parameters for group, count in zip(groups, counts, strict=True))
    near = freed / total
    if any(group.units.kind.endswith("ffn") for group in groups) or abs(near - sparsity) <= TOLERANCE:
        return
    step = together * min(group.units.parameters for group in groups) / total
    others = [near - step, near, near + step]
    raise RecipeError(
        f"sparsity {sparsity:g} of heads alone",
        f"a share that whole heads make: {', '.join(f'{share:.3f}' for share in others if share > 0)}",
        "choose one of these, or add channels: -O targets=all",
    )


def _removable(units: Units, method: StructureMethod) -> int:
    return max(0, units.count - method.min_keep)


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


def _spread(groups: Sequence[Scored], budgets: Mapping[int, float], method: StructureMethod) -> list[int]:
    """Units to remove of each group: the kinds of a block share its budget in proportion, the coarsest
    first, so that the finest makes up for what rounding left."""
    counts = [0] * len(groups)
    for block, left in budgets.items():
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
    step = method.round_to if units.kind.endswith("ffn") else 1
    kept = step * max(1, round((units.count - share) / step))
    return min(max(units.count - kept, 0), _removable(units, method))


def _lowest(groups: Sequence[Scored], counts: Sequence[int]) -> list[Tensor]:
    return [group.scores.argsort(stable=True)[:count] for group, count in zip(groups, counts, strict=True)]


def _ranked(groups: Sequence[Scored], budget: float, method: StructureMethod) -> list[Tensor]:
    """The lowest of all units whose parameters fit into the budget."""
    import torch

    candidates = [
        group.scores.argsort(stable=True)[: _removable(group.units, method)].sort().values for group in groups
    ]
    scores = torch.cat(
        [_comparable(group.scores, method)[chosen] for group, chosen in zip(groups, candidates, strict=True)]
    )
    owner = torch.cat([torch.full_like(chosen, number) for number, chosen in enumerate(candidates)])
    costs = torch.tensor([group.units.parameters for group in groups])[owner]
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


def _comparable(scores: Tensor, method: StructureMethod) -> Tensor:
    scores = scores.double()
    if method.comparable:
        return scores
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if float(spread) > 0 else scores * 0
