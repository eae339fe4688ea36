"""The plan with all blocks alike that is nearest to one with unequal blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from secateur.structure.base import StructureMethod
from secateur.structure.goal import Goal
from secateur.structure.groups import Scored, floor_of, lowest, step_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["nearest_uniform"]

Widths = Mapping[int, int]
"""By number of the group, how many units it keeps."""


class _Alike:
    """Groups of one kind and size, which keep equally many units in a uniform plan."""

    def __init__(self, groups: Sequence[Scored], numbers: list[int], method: StructureMethod) -> None:
        self.numbers, units = numbers, groups[numbers[0]].units
        self.count, self.parameters = units.count, units.parameters * len(numbers)
        self.floor, self.step = floor_of(units, method), step_of(units, method)

    def widths(self) -> list[int]:
        """What it may keep: multiples of its step from the floor on, or all."""
        return [*range(self.floor, self.count, self.step), self.count]

    def filling(self, left: float) -> int | None:
        """The most it may keep when at least so many parameters of it go."""
        most = self.count - max(0, math.ceil(left / self.parameters))
        return max((width for width in self.widths() if width <= most), default=None)


def nearest_uniform(
    groups: Sequence[Scored],
    kept: Sequence[Tensor],
    method: StructureMethod,
    legal: Callable[[Widths], bool],
    goal: Goal | None = None,
) -> list[Tensor] | None:
    """Equal widths in all blocks with no more parameters than the plan `kept`.

    The coarse kinds (heads) keep the legal number nearest to their mean in the plan; the finest kind
    (channels) makes up the parameters. Inside each group the same scores decide.

    Args:
        legal: whether a stock class can have such widths; where none can, the nearest widths are taken.
        goal: a limit that must hold too.

    Returns:
        For each group the units that stay, or None where no equal widths are that small.
    """
    classes = _classes(groups, method)
    freed = sum(
        (group.units.count - len(stays)) * group.units.parameters
        for group, stays in zip(groups, kept, strict=True)
    )
    *coarse, fine = classes
    means = [sum(len(kept[number]) for number in own.numbers) / len(own.numbers) for own in coarse]
    nearest: Widths | None = None
    for widths in _by_distance(coarse, means):
        left = freed - sum(
            (own.count - width) * own.parameters for own, width in zip(coarse, widths, strict=True)
        )
        plan = _filled(coarse, widths, fine, left, goal)
        if plan is None:
            continue
        nearest = nearest or plan
        if legal(plan):
            nearest = plan
            break
    if nearest is None:
        return None
    counts = [group.units.count - nearest[number] for number, group in enumerate(groups)]
    gone = lowest(groups, counts)
    return [group.units.others(units) for group, units in zip(groups, gone, strict=True)]


def _classes(groups: Sequence[Scored], method: StructureMethod) -> list[_Alike]:
    """The coarsest unit first."""
    alike: dict[tuple[str, int, int], list[int]] = {}
    for number, group in enumerate(groups):
        units = group.units
        alike.setdefault((units.kind, units.count, units.parameters), []).append(number)
    order = sorted(alike, key=lambda key: -key[2])
    return [_Alike(groups, alike[key], method) for key in order]


def _by_distance(coarse: Sequence[_Alike], means: Sequence[float]) -> list[tuple[int, ...]]:
    """All widths of the coarse kinds, those nearest to the means (relative to their counts) first."""

    def distance(widths: tuple[int, ...]) -> float:
        pairs = zip(coarse, widths, means, strict=True)
        return sum(abs(width - mean) / own.count for own, width, mean in pairs)

    return sorted(product(*(own.widths() for own in coarse)), key=distance)


def _filled(
    coarse: Sequence[_Alike], widths: Sequence[int], fine: _Alike, left: float, goal: Goal | None
) -> Widths | None:
    """With the widest fine kind that leaves no more parameters than allowed, and meets the goal."""
    width = fine.filling(left)
    while width is not None:
        pairs = [*zip(coarse, widths, strict=True), (fine, width)]
        plan = {number: count for own, count in pairs for number in own.numbers}
        if goal is None or goal.met([plan[number] for number in range(len(plan))]):
            return plan
        narrower = [known for known in fine.widths() if known < width]
        width = max(narrower, default=None)
    return None
