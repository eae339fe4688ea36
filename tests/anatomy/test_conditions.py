"""Conditions of family files."""

from __future__ import annotations

import pytest

from secateur.anatomy.conditions import holds
from secateur.core.errors import AnatomyError

VALUES = {"index": 3, "step": 2, "dense": [0, 3], "rank": None, "bias": True, "count": 0}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("bias", True),
        ("rank", False),
        ("not rank", True),
        ("count", False),
        ("index >= 3", True),
        ("index < 3", False),
        ("index > 2 and bias", True),
        ("index != step", True),
        ("(index + 1) % step == 0", True),
        ("index in dense", True),
        ("index not in dense or rank", False),
    ],
)
def test_conditions(condition: str, expected: bool) -> None:
    assert holds(condition, VALUES.__getitem__) is expected


@pytest.mark.parametrize("condition", ["index in rank", "index % count == 0", "rank < 3", "bias + dense"])
def test_values_that_do_not_fit(condition: str) -> None:
    with pytest.raises(AnatomyError, match="cannot be answered"):
        holds(condition, VALUES.__getitem__)


@pytest.mark.parametrize(
    "condition", ["index.real", "__import__('os')", "index ==", "'a'", "1 < index < 5", "index - 1", "-index"]
)
def test_nothing_else_is_read(condition: str) -> None:
    with pytest.raises(AnatomyError):
        holds(condition, VALUES.__getitem__)


def test_and_stops_at_the_first_that_does_not_hold() -> None:
    assert not holds("rank and missing", VALUES.__getitem__)
