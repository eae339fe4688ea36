"""Orders of removal against budgets, and the choice of BlockPruner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.method import METHODS
from secateur.structure.base import Piece
from secateur.structure.blockpruner import BlockPruner
from secateur.structure.order import chosen, reached

PIECES = [Piece(block, part, size) for block in range(4) for part, size in (("self_attn", 10), ("mlp", 18))]


@given(st.permutations(PIECES), st.floats(6, 90))
def test_budgets_are_met_to_within_half_a_piece_and_longer_orders_change_nothing(
    order: Sequence[Piece], budget: float
) -> None:
    walked = next(n for n in range(len(order) + 1) if reached(order[:n], PIECES, budget))
    found = chosen(order[:walked], PIECES, budget)
    assert found == chosen(order, PIECES, budget)
    assert len(set(found)) == len(found)
    removed = sum(piece.parameters for piece in found)
    smallest_left = min(piece.parameters for piece in PIECES if piece not in found)
    assert budget - smallest_left / 2 < removed <= budget + 9


@given(st.permutations(PIECES), st.floats(5, 90))
def test_pieces_of_one_size_are_a_prefix(order: Sequence[Piece], budget: float) -> None:
    equal = [Piece(piece.block, piece.part, 10) for piece in order]
    count = min(math.floor(budget / 10 + 0.5), len(equal) - 1)
    assert chosen(equal, equal, budget) == equal[:count]


def test_what_does_not_fit_is_passed_over() -> None:
    order = [PIECES[1], PIECES[3], PIECES[0], PIECES[2]]
    assert chosen(order, PIECES, 28) == [PIECES[1], PIECES[0]]
    assert not reached(order[:2], PIECES, 28)
    assert reached(order[:3], PIECES, 28)


def test_the_lowest_loss_goes_and_ties_go_by_position() -> None:
    pieces, losses = PIECES[:4], [3.0, 2.0, 2.0, math.inf]
    assert BlockPruner().pick(pieces, {}, lambda tried: losses) == (pieces[1], 2.0)


def test_a_shortlist_asks_for_the_pieces_that_turn_least() -> None:
    asked: list[Sequence[Piece]] = []

    def losses(tried: Sequence[Piece]) -> list[float]:
        asked.append(tried)
        return [5.0, 4.0]

    method = BlockPruner.from_options({"shortlist": 2})
    turns = {piece.name: turn for piece, turn in zip(PIECES, [8, 7, 1, 6, 2, 5, 4, 3], strict=True)}
    assert method.pick(PIECES, turns, losses) == (PIECES[4], 4.0)
    assert asked == [[PIECES[2], PIECES[4]]]
    assert method.needs_turns
    assert method.tries(8) == 2


def test_it_is_in_the_catalogue() -> None:
    assert METHODS.get("blockpruner") is BlockPruner
    with pytest.raises(Exception, match="unit"):
        BlockPruner.from_options({"unit": "head"})
