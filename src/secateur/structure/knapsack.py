"""The units whose loss is least among all choices that meet a goal (structured-baselines, 5.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.anatomy.units import Units
from secateur.core.goal import Goal
from secateur.core.knapsack import least_loss
from secateur.structure.base import StructureMethod
from secateur.structure.groups import Scored, comparable, floor_of, lowest, step_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fewest_losses", "loss_curves", "parameters_left"]


def fewest_losses(groups: Sequence[Scored], goal: Goal, method: StructureMethod) -> list[Tensor]:
    """What goes of each group: its lowest units, in the numbers whose total loss is least."""
    levels = [_levels(group.units, method) for group in groups]
    curves = loss_curves(groups, method)
    losses = [
        curve[group.units.count - at].numpy() for curve, group, at in zip(curves, groups, levels, strict=True)
    ]
    costs = [cost[at].numpy() for cost, at in zip(goal.costs, levels, strict=True)]
    chosen = least_loss(losses, costs, goal.limit - goal.rest)
    pairs = zip(groups, levels, chosen, strict=True)
    return lowest(groups, [group.units.count - int(at[level]) for group, at, level in pairs])


def _levels(units: Units, method: StructureMethod) -> Tensor:
    """How many units a group may keep, all first."""
    import torch

    floor, step = floor_of(units, method), step_of(units, method)
    return torch.tensor([units.count, *reversed(range(floor, units.count, step))])


def loss_curves(groups: Sequence[Scored], method: StructureMethod) -> list[Tensor]:
    """For each group (count + 1,) float64: the loss when its r lowest units go, r from 0 on.

    Scores that are no losses count once a parameter, above the smallest of all: with parameters as cost this
    ranks units as the spread `global` does.
    """
    import torch

    if method.losses:
        units = [group.scores.double().sort().values for group in groups]
    else:
        shown = [comparable(group.scores, method) for group in groups]
        least = min(float(scores.min()) for scores in shown)
        units = [
            (scores.sort().values - least) * group.units.parameters
            for scores, group in zip(shown, groups, strict=True)
        ]
    start = torch.zeros(1, dtype=torch.float64)
    return [torch.cat([start, own if method.losses == "total" else own.cumsum(0)]) for own in units]


def parameters_left(groups: Sequence[Scored], budget: float, method: StructureMethod) -> Goal:
    """The budget to within the cheapest unit, as a limit on what stays."""
    import torch

    costs = [
        torch.arange(group.units.count + 1, dtype=torch.float64) * group.units.parameters for group in groups
    ]
    whole = sum(float(cost[-1]) for cost in costs)
    slack = min(group.units.parameters * step_of(group.units, method) for group in groups) - 1
    floors = sum(
        float(cost[floor_of(group.units, method)]) for cost, group in zip(costs, groups, strict=True)
    )
    return Goal("parameters", max(whole - int(budget) + slack, floors), 0.0, costs)
