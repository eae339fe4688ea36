"""Channel permutations for N:M: what they promise, and brute force where it is small enough."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.pattern import Pattern
from secateur.weights.permutation import best_permutation, refine, retained, snake

from .problems import draw


def scores_of(rows: int, columns: int, seed: int) -> Tensor:
    """Channels of very unequal weight, the loud ones side by side."""
    loudness = torch.linspace(3, 0.1, columns)
    return draw((rows, columns), seed).abs() * loudness


def test_snake_by_hand() -> None:
    totals = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert snake(totals, 4).view(2, 4).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert snake(totals, 2).view(4, 2).tolist() == [[0, 7], [1, 6], [2, 5], [3, 4]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 12),
    groups=st.integers(1, 7),
    text=st.sampled_from(["2:4", "1:4", "4:8", "1:2", "3:4"]),
    at_once=st.integers(1, 8),
)
def test_promises(seed: int, rows: int, groups: int, text: str, at_once: int) -> None:
    pattern = Pattern.parse(text)
    scores = scores_of(rows, groups * pattern.of, seed)
    stored = torch.arange(scores.shape[1])
    dealt = snake(scores, pattern.of)
    refined = refine(scores, dealt, pattern, groups_at_once=at_once)
    for order in (dealt, refined):
        assert torch.equal(order.sort().values, stored)
    slack = 1 - 1e-6
    assert retained(scores, pattern, refined) >= slack * retained(scores, pattern, dealt)
    levels = [
        retained(scores, pattern, best_permutation(scores, pattern, name))
        for name in ("none", "snake", "hungarian")
    ]
    assert levels == sorted(levels)
    assert levels[0] == retained(scores, pattern, stored)


def test_snake_helps_when_loud_channels_sit_together() -> None:
    scores, pattern = scores_of(32, 64, 0), Pattern.parse("2:4")
    stored = retained(scores, pattern, torch.arange(64))
    dealt = retained(scores, pattern, snake(scores, 4))
    refined = retained(scores, pattern, refine(scores, snake(scores, 4), pattern))
    assert stored < dealt < refined < float(scores.sum())


def test_one_assignment_is_the_best_of_all() -> None:
    """1:2 with one position free: every way to pair the second channels with the first ones."""
    scores, pattern = scores_of(5, 8, 4), Pattern.parse("1:2")
    order = torch.arange(8)
    first = refine(scores, order, pattern).view(4, 2)
    base = refine_one(scores, order)
    assert retained(scores, pattern, first.flatten()) >= base * (1 - 1e-6)


def refine_one(scores: Tensor, order: Tensor) -> float:
    groups = order.view(4, 2)
    return max(
        retained(
            scores, Pattern.parse("1:2"), torch.stack([groups[list(deal), 0], groups[:, 1]], 1).flatten()
        )
        for deal in permutations(range(4))
    )


def test_equal_scores_leave_the_stored_order() -> None:
    scores = torch.ones(3, 8)
    for name in ("snake", "hungarian"):
        assert torch.equal(best_permutation(scores, Pattern.parse("2:4"), name), torch.arange(8))


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_folding_the_order_into_the_producer_changes_nothing(text: str) -> None:
    """down(act(up x)): permuting the rows of up and the columns of down is exact, N:M holds as stored."""
    up, down = draw((16, 6), 0), draw((5, 16), 1)
    order = best_permutation(down.abs(), Pattern.parse(text), "snake")
    x = draw((10, 6), 2)
    plain, folded = (x @ up.T).relu() @ down.T, (x @ up[order].T).relu() @ down[:, order].T
    torch.testing.assert_close(plain, folded)
