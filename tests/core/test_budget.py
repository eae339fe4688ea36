"""Budgets as people write them."""

from __future__ import annotations

import pytest

from secateur.core.budget import Target
from secateur.core.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("parameters=1.2M", "parameters", 1.2e6, False),
        ("parameters=7b", "parameters", 7e9, False),
        ("parameters=1_000_000", "parameters", 1e6, False),
        ("bytes = 900 MB", "bytes", 9e8, False),
        ("bytes=2GiB", "bytes", 2.0**31, False),
        ("decode=12ms", "decode", 12.0, False),
        ("decode=0.5s", "decode", 500.0, False),
        ("decode=0.8x", "decode", 0.8, True),
        ("bytes=0.5x", "bytes", 0.5, True),
    ],
)
def test_numbers_and_units(text: str, kind: str, value: float, relative: bool) -> None:
    target = Target.parse(text)
    assert (target.kind, target.relative) == (kind, relative)
    assert target.value == pytest.approx(value)
    assert target.of(200.0) == pytest.approx(200 * value if relative else value)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("paramters=1M", "did you mean 'parameters'"),
        ("1.2M", "parameters=1.2M"),
        ("bytes=900MBB", "known: GB, GiB"),
        ("decode=12m", "did you mean 'ms'"),
        ("decode=12", "unit ''"),
        ("decode=1.2x", "between 0 and 1"),
        ("bytes=", "a number"),
        ("bytes=-3MB", "a number"),
        ("parameters=0", "more than nothing"),
    ],
)
def test_what_is_not_understood_gets_a_hint(text: str, fragment: str) -> None:
    with pytest.raises(RecipeError, match=fragment):
        Target.parse(text)
