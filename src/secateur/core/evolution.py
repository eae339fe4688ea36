"""Evolutionary search over integer levels under a budget that every move keeps exactly.

Nothing here knows what a level means: the amount to remove of a layer, bits, experts. Plain Python, and the
same for the same seed (tyr-the-pruner, section 2.4).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Evaluate", "Evolution", "Gene", "Generation", "Levels", "swapped"]

Levels: TypeAlias = tuple[int, ...]
"""One level a gene."""

Evaluate: TypeAlias = Callable[[Sequence[Levels], int, int], Sequence[float]]
"""`evaluate(candidates, generation, stage)`: the fitness of each, the lower the better; all candidates of a
call are judged on the same data."""

TRIES = 20
"""Mutations tried for each offspring before there are fewer of them: few genes make few neighbours."""


@dataclass(frozen=True)
class Gene:
    """One thing that has a level.

    Attributes:
        pool: genes exchange budget with others of their pool alone.
        cost: what one level takes of the budget.
        lowest, highest: the levels there are; 0 is where the search starts.
    """

    pool: str
    cost: int
    lowest: int
    highest: int


@dataclass(frozen=True)
class Generation:
    """Attributes:
    number: from 1.
    levels: the best of it, parent of the next.
    fitness: of these levels, on the data of the last stage of this generation.
    evaluated: candidates judged in its first stage.
    """

    number: int
    levels: Levels
    fitness: float
    evaluated: int


class Evolution:
    """Search by swaps between genes: one goes down as much as another goes up.

    Args:
        genes: what has a level.
        offspring: different candidates a generation.
        survivors: how many of them each stage but the last passes on to the next, which judges on more data.
            The parent joins in the last.
        swaps: most swaps between a parent and its offspring; the number is the smaller of two draws.
        seed: each generation draws from this and its number alone.

    >>> genes = [Gene("a", 1, -2, 2), Gene("a", 1, -2, 2)]
    >>> search = Evolution(genes, offspring=2, survivors=(), swaps=1, seed="0")
    >>> [found.levels for found in search.run(lambda many, *_: [first for first, _ in many], 2)]
    [(-1, 1), (-2, 2)]
    """

    def __init__(
        self, genes: Sequence[Gene], *, offspring: int, survivors: Sequence[int], swaps: int, seed: str
    ) -> None:
        self.genes, self.offspring, self.survivors = tuple(genes), offspring, tuple(survivors)
        self.swaps, self.seed = swaps, seed

    def run(
        self, evaluate: Evaluate, generations: int, done: Sequence[Generation] = ()
    ) -> Iterator[Generation]:
        """The generations from behind those that are `done`; it ends early where nothing can move."""
        parent = done[-1].levels if done else (0,) * len(self.genes)
        for number in range(len(done) + 1, generations + 1):
            offspring = self._offspring(parent, random.Random(f"{self.seed}/{number}"))
            if not offspring:
                return
            best = self._select(parent, offspring, evaluate, number)
            parent = best.levels
            yield best

    def _offspring(self, parent: Levels, chance: random.Random) -> list[Levels]:
        """Different from each other and from the parent, in the order they were found."""
        found: dict[Levels, None] = {}
        for _ in range(TRIES * self.offspring):
            if len(found) == self.offspring:
                break
            child = parent
            for _ in range(min(chance.randint(1, self.swaps), chance.randint(1, self.swaps))):
                child = swapped(self.genes, child, chance)
            if child != parent:
                found[child] = None
        return list(found)

    def _select(self, parent: Levels, offspring: list[Levels], evaluate: Evaluate, number: int) -> Generation:
        left = offspring
        for stage, keep in enumerate(self.survivors):
            left = [levels for _, levels in _ranked(left, evaluate(left, number, stage))[:keep]]
        left = [parent, *left]  # first, so that it stays where nothing is better
        fitness, levels = _ranked(left, evaluate(left, number, len(self.survivors)))[0]
        return Generation(number, levels, fitness, len(offspring))


def swapped(genes: Sequence[Gene], levels: Levels, chance: random.Random) -> Levels:
    """One gene goes down and another of its pool up, by as many levels as make both equally dear.

    The same levels come back where no pair can move.
    """
    for down in chance.sample(range(len(genes)), len(genes)):
        partners = [up for up in range(len(genes)) if up != down and _fits(genes, levels, down, up)]
        if partners:
            up = chance.choice(partners)
            fewer, more = _amounts(genes[down], genes[up])
            moved = list(levels)
            moved[down] -= fewer
            moved[up] += more
            return tuple(moved)
    return levels


def _amounts(down: Gene, up: Gene) -> tuple[int, int]:
    """The fewest levels of both that cost the same."""
    common = math.lcm(down.cost, up.cost)
    return common // down.cost, common // up.cost


def _fits(genes: Sequence[Gene], levels: Levels, down: int, up: int) -> bool:
    if genes[down].pool != genes[up].pool:
        return False
    fewer, more = _amounts(genes[down], genes[up])
    return levels[down] - fewer >= genes[down].lowest and levels[up] + more <= genes[up].highest


def _ranked(candidates: Sequence[Levels], fitness: Sequence[float]) -> list[tuple[float, Levels]]:
    """From best to worst, equal ones in their order; what has no finite fitness comes last."""
    pairs = [
        (value if math.isfinite(value) else math.inf, levels)
        for value, levels in zip(fitness, candidates, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair[0])
