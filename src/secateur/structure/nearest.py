"""The plan with all blocks alike that is nearest to one with unequal blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from secateur.core.goal import Goal
from secateur.structure.base import StructureMethod
from secateur.structure.groups import Scored, floor_of, lowest, step_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["nearest_uniform"]

Widths = Mapping[int, int]
"""By number of the group, how many units it keeps."""


class _Alike:
    """Groups which keep equally many units in a uniform plan."""

    def __init__(self, groups: Sequence[Scored], numbers: list[int], method: StructureMethod) -> None:
        self.numbers = numbers
        units = min((groups[number].units for number in numbers), key=lambda own: own.count)
        self.count, self.parameters = units.count, units.parameters * len(numbers)
        self.floor, self.step = floor_of(units, method), step_of(units, method)

    def widths(self) -> list[int]:
        """What each may keep: multiples of its step from the floor on, or all that the smallest has."""
        return [*range(self.floor, self.count, self.step), self.count]

    def filling(self, room: int) -> int | None:
        """The most each may keep of at most so many parameters in all."""
        return max((width for width in self.widths() if width * self.parameters <= room), default=None)


def nearest_uniform(
    groups: Sequence[Scored],
    kept: Sequence[Tensor],
    method: StructureMethod,
    legal: Callable[[Widths], bool] | None = None,
    goal: Goal | None = None,
) -> list[Tensor] | None:
    """Equal widths in all blocks with no more parameters than the plan `kept`.

    The coarse kinds (heads) keep the legal number nearest to their mean in the plan; the finest kind
    (channels) makes up the parameters. Inside each group the same scores decide.

    Args:
        legal: whether a stock class can have such widths; where none can, the nearest widths are taken.
            None for a model that no stock class has: then groups of one kind become equal even where
            they have different sizes already.
        goal: a limit that must hold too.

    Returns:
        For each group the units that stay, or None where no equal widths are that small.
    """
    *coarse, fine = _classes(groups, method, by_size=legal is not None)
    means = [sum(len(kept[number]) for number in own.numbers) / len(own.numbers) for own in coarse]
    most = sum(len(stays) * group.units.parameters for group, stays in zip(groups, kept, strict=True))
    nearest: Widths | None = None
    for widths in _by_distance(coarse, means):
        room = most - sum(width * own.parameters for own, width in zip(coarse, widths, strict=True))
        plan = _filled(coarse, widths, fine, room, goal)
        if plan is None:
            continue
        nearest = nearest or plan
        if legal is None or legal(plan):
            nearest = plan
            break
    if nearest is None:
        return None
    counts = [group.units.count - nearest[number] for number, group in enumerate(groups)]
    gone = lowest(groups, counts)
    return [group.units.others(units) for group, units in zip(groups, gone, strict=True)]


def _classes(groups: Sequence[Scored], method: StructureMethod, *, by_size: bool) -> list[_Alike]:
    """The coarsest unit first."""
    alike: dict[tuple[str, int, int], list[int]] = {}
    for number, group in enumerate(groups):
        units = group.units
        size = units.count if by_size else 0
        alike.setdefault((units.kind, size, units.parameters), []).append(number)
    order = sorted(alike, key=lambda key: -key[2])
    return [_Alike(groups, alike[key], method) for key in order]


def _by_distance(coarse: Sequence[_Alike], means: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """All widths of the coarse kinds, those nearest to the means (relative to their counts) first.

    Best first: of a choice only its neighbours, one step further in one kind, are looked at.
    """

    def distance(places: tuple[int, ...]) -> float:
        return sum(own[place][0] for own, place in zip(each, places, strict=True))

    each = [
        sorted((abs(width - mean) / own.count, width) for width in own.widths())
        for own, mean in zip(coarse, means, strict=True)
    ]
    start = (0,) * len(each)
    waiting, seen = [(distance(start), start)], {start}
    while waiting:
        _, at = heappop(waiting)
        yield tuple(own[place][1] for own, place in zip(each, at, strict=True))
        for kind, own in enumerate(each):
            further = (*at[:kind], at[kind] + 1, *at[kind + 1 :])
            if further[kind] < len(own) and further not in seen:
                seen.add(further)
                heappush(waiting, (distance(further), further))


def _filled(
    coarse: Sequence[_Alike], widths: Sequence[int], fine: _Alike, room: int, goal: Goal | None
) -> Widths | None:
    """With the widest fine kind that the room allows, and that meets the goal."""
    width = fine.filling(room)
    while width is not None:
        pairs = [*zip(coarse, widths, strict=True), (fine, width)]
        plan = {number: count for own, count in pairs for number in own.numbers}
        if goal is None or goal.met([plan[number] for number in range(len(plan))]):
            return plan
        narrower = [known for known in fine.widths() if known < width]
        width = max(narrower, default=None)
    return None
