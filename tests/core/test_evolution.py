"""The search keeps its budget, finds what is planted, and goes on where it stopped."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from secateur.core.evolution import Evolution, Gene, Levels, swapped

GENES = [
    *(Gene("heads", 12, -1, 2) for _ in range(5)),
    *(Gene("ffn", 4, -4, 4) for _ in range(4)),
    *(Gene("ffn", 6, -3, 4) for _ in range(3)),
]


def cost(genes: Sequence[Gene], levels: Levels, pool: str) -> int:
    return sum(gene.cost * level for gene, level in zip(genes, levels, strict=True) if gene.pool == pool)


def search(genes: Sequence[Gene] = GENES, seed: str = "0", **settings: object) -> Evolution:
    return Evolution(genes, **{"offspring": 12, "survivors": (4,), "swaps": 4, "seed": seed, **settings})  # type: ignore[arg-type]


def test_ten_thousand_swaps_keep_every_budget_and_range() -> None:
    chance, levels = random.Random(0), (0,) * len(GENES)
    seen = set()
    for _ in range(10_000):
        moved = swapped(GENES, levels, chance)
        assert moved != levels
        levels = moved
        seen.add(levels)
        assert cost(GENES, levels, "heads") == cost(GENES, levels, "ffn") == 0
        for gene, level in zip(GENES, levels, strict=True):
            assert gene.lowest <= level <= gene.highest
    assert len(seen) > 5000
    assert any(sum(levels[:5]) == 0 and any(levels[:5]) for levels in seen)
    assert any(sum(levels[5:]) != 0 for levels in seen), "genes of different cost never exchanged"


@pytest.mark.parametrize("genes", [[Gene("a", 1, -1, 1)], [Gene("a", 1, 0, 0)] * 3, []])
def test_where_nothing_can_move_the_search_ends(genes: list[Gene]) -> None:
    assert list(search(genes).run(lambda *_: pytest.fail("nothing to judge"), 5)) == []


def test_offspring_are_different_from_each_other_and_from_their_parent() -> None:
    calls: list[tuple[list[Levels], int, int]] = []

    def evaluate(candidates: Sequence[Levels], generation: int, stage: int) -> list[float]:
        calls.append((list(candidates), generation, stage))
        return [float(abs(levels[0])) for levels in candidates]

    parents = [(0,) * len(GENES), *(best.levels for best in search().run(evaluate, 3))]
    first = [(candidates, generation) for candidates, generation, stage in calls if stage == 0]
    for candidates, generation in first:
        assert len(set(candidates)) == len(candidates) == 12
        assert parents[generation - 1] not in candidates
    for candidates, generation, stage in calls:
        if stage == 1:
            assert candidates[0] == parents[generation - 1]
            assert len(candidates) == 5


def test_few_neighbours_make_fewer_offspring_and_no_endless_loop() -> None:
    pair = [Gene("a", 1, -1, 1), Gene("a", 1, -1, 1)]
    found = list(search(pair, survivors=()).run(lambda many, *_: [levels[0] for levels in many], 2))
    assert [best.evaluated for best in found] == [2, 2]
    assert found[-1].levels == (-1, 1)


def test_the_planted_optimum_is_found_and_never_left() -> None:
    wanted = (2, 2, -1, -1, -2, 4, -4, 2, -2, 0, 0, 0)
    genes = [Gene(g.pool, 1, -2 if g.pool == "heads" else -4, 4) for g in GENES]

    def distance(candidates: Sequence[Levels], *_: int) -> list[float]:
        return [sum(abs(a - b) for a, b in zip(levels, wanted, strict=True)) for levels in candidates]

    fitness = [best.fitness for best in search(genes).run(distance, 60)]
    assert fitness == sorted(fitness, reverse=True)
    assert fitness[-1] == 0


def test_the_parent_stays_where_nothing_is_better_and_undefined_fitness_never_wins() -> None:
    equal = next(search().run(lambda many, *_: [1.0] * len(many), 1))
    assert equal.levels == (0,) * len(GENES)

    def broken(candidates: Sequence[Levels], *_: int) -> list[float]:
        return [float("nan") if any(levels) else 3.0 for levels in candidates]

    assert next(search().run(broken, 1)).fitness == 3.0


def test_a_search_goes_on_where_it_stopped() -> None:
    def evaluate(candidates: Sequence[Levels], generation: int, stage: int) -> list[float]:
        chance = random.Random(f"{generation}/{stage}")
        weights = [chance.random() for _ in GENES]
        return [sum(w * level for w, level in zip(weights, levels, strict=True)) for levels in candidates]

    whole = list(search().run(evaluate, 6))
    assert list(search().run(evaluate, 6, whole[:4])) == whole[4:]
    assert list(search(seed="1").run(evaluate, 6)) != whole
