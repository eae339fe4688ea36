from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.report.numbers import (
    change,
    count,
    duration,
    number,
    percent,
    percent_tick,
    size,
    size_tick,
    tick,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(6.43858), "6.439"),
        (number(451.774), "451.8"),
        (number(2499.39), "2,499"),
        (number(0.41873), "0.419"),
        (number(1.2345e-7), "1.23e-07"),
        (number(0), "0"),
        (number(math.inf), "infinite"),
        (number(math.nan), "not a number"),
        (percent(0.5), "50.0%"),
        (percent(0.99996), "100.00%"),
        (percent(0.9996), "99.96%"),
        (percent(1.0), "100.0%"),
        (size(312), "312 bytes"),
        (size(13_476_850_688), "13.5 GB"),
        (size(999_999), "1.00 MB"),
        (count(260_032), "260,032"),
        (count(6_738_415_616), "6.74 billion"),
        (duration(0.412), "0.41 s"),
        (duration(59), "59 s"),
        (duration(252), "4 min 12 s"),
        (duration(7_380), "2 h 3 min"),
        (change(4, 4), "no change"),
        (change(4, 3), "−25.0%"),
        (change(4, 4.1), "+2.5%"),
        (change(6.43858, 26.55343), "×4.12"),
        (change(10_000, 10_001), "≈ 0%"),
        (change(0, 5), ""),
        (change(5, math.inf), ""),
        (tick(0.1 + 0.2), "0.3"),
        (tick(10_000), "10,000"),
        (percent_tick(0.475), "47.5%"),
        (size_tick(15e9), "15 GB"),
        (size_tick(2.5e9), "2.5 GB"),
        (size_tick(250e3), "250 kB"),
    ],
)
def test_as_people_read_it(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_a_shown_number_is_within_half_a_unit_of_its_third_digit(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@given(st.integers(min_value=0, max_value=10**15), st.integers(min_value=0, max_value=10**15))
def test_a_larger_size_never_reads_smaller(a: int, b: int) -> None:
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}

    def read(text: str) -> float:
        digits, unit = text.split(" ")
        return float(digits.replace(",", "")) * units[unit]

    low, high = sorted((a, b))
    assert read(size(low)) <= read(size(high))


@given(st.floats(min_value=1e-9, max_value=1 - 1e-9))
def test_something_left_is_never_shown_as_nothing_left(fraction: float) -> None:
    assert percent(fraction) not in ("0.0%", "100.0%")
