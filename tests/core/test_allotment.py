"""The choice is the best there is: by trying all, by another solver, and on a case worked by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from secateur.core.allotment import InfeasibleError, allot, allot_groups, frontier

BITS = np.array([1, 2, 3])
FLOORS = {1: 1, 2: 1}  # one item of 2 and one of 3 bits
Floats = NDArray[np.float64]


def total(losses: Floats, levels: list[int]) -> float:
    return float(losses[np.arange(len(losses)), levels].sum())


def by_trying_all(losses: Floats, budget: int, floors: dict[int, int], exactly: bool) -> float:
    best = np.inf
    for choice in product(range(losses.shape[1]), repeat=len(losses)):
        spent = int(BITS[list(choice)].sum())
        fits = spent == budget if exactly else spent <= budget
        if fits and all(choice.count(level) >= floor for level, floor in floors.items()):
            best = min(best, total(losses, list(choice)))
    return best


@pytest.mark.parametrize(
    ("budget", "loss", "bits"),
    [
        (7, 3.4225, [3, 2, 1, 1]),
        (8, 1.4725, [3, 2, 2, 1]),
        (9, 1.0, [3, 3, 2, 1]),
        (10, 0.79, [3, 3, 2, 2]),
    ],
)
def test_the_worked_example(budget: int, loss: float, bits: list[int]) -> None:
    frequency, weight = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.45, 0.30, 0.15, 0.10])
    errors = np.array([[8, 3, 1], [6, 2.5, 1], [9, 4, 1.5], [5, 2, 0.8]])
    losses = (frequency * weight)[:, None] * errors**2
    levels = allot(losses, BITS, budget, at_least=FLOORS)
    assert BITS[levels].tolist() == bits
    assert total(losses, levels) == pytest.approx(loss)
    with pytest.raises(InfeasibleError) as refused:
        allot(losses, BITS, 6, at_least=FLOORS)
    assert (refused.value.least, refused.value.most) == (7, 11)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 18), st.booleans(), st.booleans())
def test_no_other_choice_loses_less(seed: int, items: int, budget: int, exactly: bool, floors: bool) -> None:
    losses = np.random.default_rng(seed).random((items, 3))
    if seed % 3 == 0:
        losses = np.floor(4 * losses)  # ties
    asked = FLOORS if floors else {}
    best = by_trying_all(losses, budget, asked, exactly)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            allot(losses, BITS, budget, at_least=asked, exactly=exactly)
        return
    levels = allot(losses, BITS, budget, at_least=asked, exactly=exactly)
    spent = int(BITS[levels].sum())
    assert spent == budget if exactly else spent <= budget
    assert all(levels.count(level) >= floor for level, floor in asked.items())
    assert total(losses, levels) == pytest.approx(best)


def test_eight_experts_by_trying_all() -> None:
    losses = np.sort(np.random.default_rng(4).random((8, 3)))[:, ::-1]
    for budget in (11, 13, 16, 20):
        assert total(losses, allot(losses, BITS, budget, at_least=FLOORS)) == pytest.approx(
            by_trying_all(losses, budget, FLOORS, False)
        )


def test_the_integer_programme_of_another_solver() -> None:
    losses = np.random.default_rng(1).random((16, 3))
    one_each = np.kron(np.eye(16), np.ones(3))
    spent = np.tile(BITS, 16)[None]
    twos, threes = (np.tile(np.arange(3) == level, 16)[None].astype(float) for level in (1, 2))
    for budget in (19, 25, 32, 40, 48):
        found = milp(
            losses.ravel(),
            integrality=np.ones(48),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(spent, -np.inf, budget),
                LinearConstraint(twos, 1, np.inf),
                LinearConstraint(threes, 1, np.inf),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert total(losses, allot(losses, BITS, budget, at_least=FLOORS)) == pytest.approx(found.fun)


def test_a_larger_budget_never_loses_more() -> None:
    losses = np.random.default_rng(2).random((12, 3))
    totals = [total(losses, allot(losses, BITS, budget, at_least=FLOORS)) for budget in range(15, 37)]
    assert totals == sorted(totals, reverse=True)


def test_it_is_never_worse_than_a_uniform_choice_or_one_by_another_order() -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        losses = generator.random((8, 3))
        for level in range(3):
            uniform = total(losses, [level] * 8)
            assert total(losses, allot(losses, BITS, 8 * BITS[level])) <= uniform
        other = generator.permutation([2, 2, 1, 1, 1, 1, 0, 0])
        assert total(losses, allot(losses, BITS, 16, at_least=FLOORS)) <= total(losses, list(other))


def test_an_item_that_loses_most_gets_most() -> None:
    losses = np.tile([3.0, 2.0, 1.0], (6, 1))
    losses[4] *= 10
    levels = allot(losses, BITS, 9, at_least=FLOORS)
    assert levels[4] == 2


def test_items_in_another_order_get_the_same() -> None:
    losses = np.random.default_rng(5).random((9, 3))
    order = np.random.default_rng(6).permutation(9)
    levels = np.array(allot(losses, BITS, 17, at_least=FLOORS))
    assert allot(losses[order], BITS, 17, at_least=FLOORS) == levels[order].tolist()


def test_items_that_lose_nothing_take_the_lowest_level() -> None:
    losses = np.array([[4.0, 1.0, 0.5], [0, 0, 0], [4.0, 1.0, 0.5], [0, 0, 0]])
    assert allot(losses, BITS, 12) == [2, 0, 2, 0]


@pytest.mark.parametrize("exactly", [True, False])
def test_groups_that_share_a_budget(exactly: bool) -> None:
    generator = np.random.default_rng(7)
    for budget in range(12, 17):
        tables = [generator.random((3, 3)) for _ in range(2)]
        found = allot_groups([frontier(table, BITS, FLOORS) for table in tables], budget, exactly=exactly)
        best = min(
            by_trying_all(tables[0], first, FLOORS, True) + by_trying_all(tables[1], second, FLOORS, True)
            for first in range(10)
            for second in range(10)
            if (first + second == budget if exactly else first + second <= budget)
        )
        assert sum(total(t, own) for t, own in zip(tables, found, strict=True)) == pytest.approx(best)
    with pytest.raises(InfeasibleError) as refused:
        allot_groups([frontier(table, BITS, FLOORS) for table in tables], 11, exactly=exactly)
    assert refused.value.least == 12


def test_sizes_may_differ_by_item() -> None:
    losses = np.array([[5.0, 0.0], [4.0, 0.0]])
    assert allot(losses, np.array([[0, 7], [0, 3]]), 6) == [0, 1]


def test_what_cannot_be_asked_is_refused() -> None:
    losses = np.ones((2, 3))
    with pytest.raises(ValueError, match="floors"):
        allot(losses, BITS, 6, at_least={0: 2, 1: 1})
    with pytest.raises(ValueError, match="floors"):
        allot(losses, BITS, 6, at_least={3: 1})
    with pytest.raises(ValueError, match="finite"):
        allot(np.full((2, 3), np.nan), BITS, 6)
