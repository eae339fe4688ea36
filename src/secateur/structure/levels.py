"""Levels of removal of one kind of unit in one block: how many units go, and what the rest becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from secateur.anatomy.units import Units
from secateur.core.evolution import Gene
from secateur.structure.base import SearchMethod
from secateur.structure.compensation import refit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ladder", "Version", "ladders", "solve", "stand_in"]

FINEST = 344
"""The paper's finest step: 32 of 11008 channels."""


@dataclass(frozen=True)
class Ladder:
    """Attributes:
    block: index of the block.
    units: of one kind in it.
    removed: how many of them are gone at level 0.
    step: how many more at each level above.
    lowest, highest: the levels there are.
    """

    block: int
    units: Units
    removed: int
    step: int
    lowest: int
    highest: int

    def removed_at(self, level: int) -> int:
        return self.removed + level * self.step

    @property
    def gene(self) -> Gene:
        """What the search sees: a level costs the parameters that it frees."""
        return Gene(self.units.kind, self.step * self.units.parameters, self.lowest, self.highest)

    def summary(self) -> dict[str, int | str]:
        """JSON-able, for the record of a search."""
        kind, count = self.units.kind, self.units.count
        return {
            "block": self.block,
            "kind": kind,
            "units": count,
            "removed": self.removed,
            "step": self.step,
        }


def ladders(
    groups: Sequence[tuple[int, Units]], removed: Sequence[int], iteration: int, method: SearchMethod
) -> list[Ladder]:
    """The levels of every kind in every block.

    Args:
        groups: block and units.
        removed: how many of each are gone at level 0.
        iteration: from 0; each halves the step, down to one head or the finest step of channels. Blocks share
            the step of a kind, so that a swap between two of them changes no total.
    """
    half = (method.levels - 1) // 2
    found = []
    for (block, units), gone in zip(groups, removed, strict=True):
        most = max(other.count for _, other in groups if other.kind == units.kind)
        step = _step(units.kind, most, method.step / 2**iteration, method)
        lowest = -min(gone // step, half)
        highest = min(max(units.count - method.min_keep - gone, 0) // step, half)
        found.append(Ladder(block, units, gone, step, lowest, highest))
    return found


def _step(kind: str, count: int, share: float, method: SearchMethod) -> int:
    channels = kind.endswith("ffn")
    finest = max(method.round_to, count // FINEST) if channels else 1
    multiple = method.round_to if channels else 1
    return max(finest, multiple * round(share * count / multiple), 1)


class Version(NamedTuple):
    """A matrix at one level.

    Attributes:
        kept: units that stay, sorted int64.
        weight: (d, columns of these units).
    """

    kept: Tensor
    weight: Tensor


def solve(
    ladder: Ladder, scores: Tensor, weight: Tensor, hessian: Tensor, method: SearchMethod
) -> dict[int, Version]:
    """The matrix at every level; what goes at one also goes at all above.

    Args:
        scores: (count,) the lowest go first.
        weight: (d, C) of the dense matrix.
        hessian: (C, C) of its input.

    Raises:
        NumericsError: a Hessian without a solution.
    """
    order = scores.argsort(stable=True)
    found = {}
    for level in range(ladder.lowest, ladder.highest + 1):
        kept = ladder.units.others(order[: ladder.removed_at(level)])
        columns = ladder.units.columns(kept).to(weight.device)
        new = refit(weight, hessian, columns)[0] if method.compensate == "least_squares" else weight
        found[level] = Version(kept, new[:, columns])
    return found


def stand_in(units: Units, versions: Mapping[int, Version], how: str) -> Tensor | None:
    """(d, C) of what later blocks see in place of all levels, or None for the dense matrix: the mean weighted
    by what each level keeps, or level 0 (tyr-the-pruner, section 2.3)."""
    if how == "none":
        return None
    chosen = {0: versions[0]} if how == "median" else versions
    shares = {level: len(version.kept) for level, version in chosen.items()}
    first = versions[0].weight
    mean = first.new_zeros(first.shape[0], units.writer.shape[1])
    for level, version in chosen.items():
        columns = units.columns(version.kept).to(mean.device)
        mean.index_add_(1, columns, version.weight * (shares[level] / sum(shares.values())))
    return mean
