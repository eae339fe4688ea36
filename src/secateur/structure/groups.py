"""Groups of units of one kind in one block, and what every way of choosing among them shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.anatomy.units import Units
from secateur.structure.base import StructureMethod, UnitMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scored", "comparable", "floor_of", "lowest", "removable", "step_of"]


@dataclass(frozen=True)
class Scored:
    """The units of one kind in one block with their importance, (count,)."""

    block: int
    units: Units
    scores: Tensor


def step_of(units: Units, method: UnitMethod) -> int:
    """Widths are multiples of this."""
    return method.round_to if units.kind.endswith("ffn") else 1


def floor_of(units: Units, method: UnitMethod) -> int:
    """The fewest units that stay."""
    step = step_of(units, method)
    return min(step * math.ceil(method.min_keep / step), units.count)


def removable(units: Units, method: UnitMethod) -> int:
    """The most units that go."""
    return units.count - floor_of(units, method)


def lowest(groups: Sequence[Scored], counts: Sequence[int]) -> list[Tensor]:
    """So many of the units with the smallest scores of each group; ties go by position."""
    return [group.scores.argsort(stable=True)[:count] for group, count in zip(groups, counts, strict=True)]


def comparable(scores: Tensor, method: StructureMethod) -> Tensor:
    """Scores of one group as they compete with those of others, float64."""
    scores = scores.double()
    if method.comparable:
        return scores
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if float(spread) > 0 else scores * 0
