"""The choice is the best there is, on cases small enough to try all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.core.knapsack import least_loss


@settings(max_examples=150, deadline=None)
@example(1041, 3, 6, 0.25, False)  # two choices that differ by less than a millionth of the gap
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.booleans())
def test_no_other_choice_within_the_limit_loses_less(
    seed: int, groups: int, levels: int, share: float, whole: bool
) -> None:
    generator = np.random.default_rng(seed)
    losses = [np.sort(generator.random(levels) * 10.0 ** generator.integers(-3, 4)) for _ in range(groups)]
    costs = [-np.sort(-generator.integers(0, 40, levels).astype(float)) for _ in range(groups)]
    if whole:  # many ties
        losses = [np.floor(4 * loss) for loss in losses]
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    limit = least + share * (most - least)
    found = least_loss(losses, costs, limit)
    every = product(*(range(levels) for _ in range(groups)))
    totals = [
        (sum(o[i] for o, i in zip(losses, choice, strict=True)))
        for choice in every
        if sum(o[i] for o, i in zip(costs, choice, strict=True)) <= limit
    ]
    assert sum(o[i] for o, i in zip(costs, found, strict=True)) <= limit
    assert sum(o[i] for o, i in zip(losses, found, strict=True)) == pytest.approx(min(totals), rel=1e-9)


def test_a_limit_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest"):
        least_loss([np.array([0.0, 1.0])], [np.array([3.0, 2.0])], 1.5)


def test_large_instances_are_solved_and_always_alike() -> None:
    generator = np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(generator.random(2000)).cumsum()]) for _ in range(40)]
    costs = [np.arange(2001, 0, -1) * (384.0 if group % 2 else 5120.0) for group in range(40)]
    limit = 0.7 * sum(cost[0] for cost in costs)
    first, second = (least_loss(losses, costs, limit) for _ in range(2))
    assert first == second
    assert limit - 384 < sum(cost[level] for cost, level in zip(costs, first, strict=True)) <= limit
