"""One level for each item within a budget of whole units, with a floor under how many items get some levels.

Exact dynamic programmes (mc-moe, section 2.3) over any table of losses: bits, ranks, what goes, what stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frontier", "InfeasibleError", "allot", "allot_groups", "frontier"]

Floats = NDArray[np.float64]


class InfeasibleError(ValueError):
    """A budget that no choice meets.

    Attributes:
        least, most: units that choices take which keep to the floors.
    """

    def __init__(self, budget: int, least: int, most: int) -> None:
        super().__init__(f"a budget of {budget} where {least} to {most} units can be spent")
        self.least, self.most = least, most


@dataclass(frozen=True)
class Frontier:
    """The best choice for every number of units that one group of items may take.

    Attributes:
        losses: (most + 1,) least total loss with exactly so many units, infinite where no choice takes them.
    """

    losses: Floats
    _sizes: NDArray[np.int64]
    _choices: Sequence[Mapping[tuple[int, ...], NDArray[np.int16]]]
    _states: Sequence[tuple[int, ...]]
    _end: tuple[int, ...]

    @property
    def least(self) -> int:
        """The fewest units of a choice that keeps to the floors."""
        return int(np.flatnonzero(np.isfinite(self.losses))[0])

    @property
    def most(self) -> int:
        """The most units of one."""
        return int(np.flatnonzero(np.isfinite(self.losses))[-1])

    def spent(self, budget: int, *, exactly: bool) -> int:
        """Units of the best choice within the budget, the fewest among equals. Raises `InfeasibleError`."""
        allowed = self.losses[budget : budget + 1] if exactly else self.losses[: max(budget, -1) + 1]
        if budget < 0 or not np.isfinite(allowed).any():
            raise InfeasibleError(budget, self.least, self.most)
        return budget if exactly else int(allowed.argmin())

    def levels(self, units: int) -> list[int]:
        """The level of each item in the best choice that takes just so many units."""
        levels, state = [], self._end
        for item in range(len(self._choices) - 1, -1, -1):
            packed = int(self._choices[item][state][units])
            level, before = divmod(packed, len(self._states))
            levels.append(level)
            units, state = units - int(self._sizes[item, level]), self._states[before]
        return levels[::-1]


def frontier(losses: Floats, sizes: NDArray[np.int64], at_least: Mapping[int, int] | None = None) -> Frontier:
    """Solve for all budgets at once.

    Among choices that lose alike, items from the last on get lower levels.

    Args:
        losses: (items, levels), finite.
        sizes: (levels,) or (items, levels) units of each level, not negative.
        at_least: by level, how many items must get it.

    Raises:
        ValueError: more items are asked for than there are, or a size below zero.
    """
    items, count = losses.shape
    sizes = np.broadcast_to(np.asarray(sizes, dtype=np.int64), (items, count))
    floors = {level: floor for level, floor in (at_least or {}).items() if floor}
    if sum(floors.values()) > items or any(not 0 <= level < count for level in floors):
        raise ValueError(f"floors {floors} under {items} items with {count} levels")
    if (sizes < 0).any() or not np.isfinite(losses).all():
        raise ValueError("sizes must not be negative, and losses finite")
    states = list(product(*(range(floor + 1) for floor in floors.values())))
    best = {state: np.full(int(sizes.max(1).sum()) + 1, np.inf) for state in states}
    best[states[0]][0] = 0.0
    choices = []
    for item in range(items):
        best, chosen = _with_item(best, losses[item], sizes[item], floors)
        choices.append(chosen)
    return Frontier(best[states[-1]], sizes, choices, states, states[-1])


State = dict[tuple[int, ...], Floats]


def _with_item(
    best: State, losses: Floats, sizes: NDArray[np.int64], floors: Mapping[int, int]
) -> tuple[State, dict[tuple[int, ...], NDArray[np.int16]]]:
    """The best losses with one more item, and by state the level it took times the states, plus the one it
    came from."""
    new = {state: np.full_like(loss, np.inf) for state, loss in best.items()}
    chosen = {state: np.zeros(len(loss), dtype=np.int16) for state, loss in best.items()}
    for level, (loss, size) in enumerate(zip(losses, sizes.tolist(), strict=True)):
        for number, (state, before) in enumerate(best.items()):
            after = _counted(state, level, floors)
            total = before[: len(before) - size] + loss
            better = total < new[after][size:]
            new[after][size:][better] = total[better]
            chosen[after][size:][better] = level * len(best) + number
    return new, chosen


def _counted(state: tuple[int, ...], level: int, floors: Mapping[int, int]) -> tuple[int, ...]:
    """How many items have the levels with floors, counted no further than these."""
    pairs = zip(state, floors.items(), strict=True)
    return tuple(min(seen + (own == level), floor) for seen, (own, floor) in pairs)


def allot(
    losses: Floats,
    sizes: NDArray[np.int64],
    budget: int,
    *,
    at_least: Mapping[int, int] | None = None,
    exactly: bool = False,
) -> list[int]:
    """The level of each item with the least total loss.

    Args:
        losses, sizes, at_least: see `frontier`.
        budget: units of all items together.
        exactly: spend it all; otherwise it is a limit.

    Raises:
        InfeasibleError: no choice meets the budget and the floors.
        ValueError: see `frontier`.
    """
    found = frontier(losses, sizes, at_least)
    return found.levels(found.spent(budget, exactly=exactly))


def allot_groups(groups: Sequence[Frontier], budget: int, *, exactly: bool = False) -> list[list[int]]:
    """The same for several groups, each with floors of its own, that share one budget.

    Raises:
        InfeasibleError: no choice meets the budget and the floors.
    """
    total, splits = np.zeros(1), []
    for group in groups:
        total, taken = _joined(total, group.losses)
        splits.append(taken)
    reachable = np.flatnonzero(np.isfinite(total))
    allowed = total[budget : budget + 1] if exactly else total[: max(budget, -1) + 1]
    if budget < 0 or not np.isfinite(allowed).any():
        raise InfeasibleError(budget, int(reachable[0]), int(reachable[-1]))
    units = budget if exactly else int(allowed.argmin())
    found = []
    for group, taken in zip(groups[::-1], splits[::-1], strict=True):
        own = int(taken[units])
        found.append(group.levels(own))
        units -= own
    return found[::-1]


def _joined(total: Floats, losses: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Least losses of two budgets together, and how much of each goes to the second."""
    joined = np.full(len(total) + len(losses) - 1, np.inf)
    taken = np.zeros(len(joined), dtype=np.int64)
    for units in np.flatnonzero(np.isfinite(losses)).tolist():
        part = slice(units, units + len(total))
        with_these = total + losses[units]
        better = with_these < joined[part]
        joined[part][better] = with_these[better]
        taken[part][better] = units
    return joined, taken
