from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.report.svg import Point, Series, axis, chart, legend, quality_axis

from .reading import read

FINITE = st.floats(min_value=-1e9, max_value=1e9)


def centres(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", svg)
    return [(float(x), float(y)) for x, y in found]


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_a_linear_axis_holds_its_values_and_ticks(values: list[float]) -> None:
    scale = axis("", values)
    assert all(-1e-6 <= scale.place(value) <= 1 + 1e-6 for value in (*values, *scale.ticks))
    assert 1 <= len(scale.ticks) <= 12


@given(st.lists(st.floats(min_value=1e-9, max_value=1e9), min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_its_values_and_ticks(values: list[float]) -> None:
    scale = axis("", values, log=True)
    assert all(-1e-6 <= scale.place(value) <= 1 + 1e-6 for value in (*values, *scale.ticks))
    assert 1 <= len(scale.ticks) <= 22


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis() -> None:
    scale = axis("", [1e-4, 1.0], log=True)
    steps = [scale.place(10.0**k) for k in range(-4, 1)]
    assert steps == pytest.approx([steps[0] + k * (steps[-1] - steps[0]) / 4 for k in range(5)])


def test_blocks_have_whole_ticks() -> None:
    assert axis("block", range(5), whole=True).ticks == (0, 1, 2, 3, 4)
    assert all(tick == int(tick) for tick in axis("block", range(126), whole=True).ticks)


def test_bytes_start_at_zero_when_asked_to() -> None:
    scale = axis("bytes", [9e9, 1e10], include=(0,))
    assert scale.low == 0
    assert scale.ticks[0] == 0


@pytest.mark.parametrize(("values", "log"), [((6.1, 9.4), False), ((6.4, 81.9), True), ((0.0, 9.4), False)])
def test_quality_is_logarithmic_beyond_a_factor_of_five(values: tuple[float, float], log: bool) -> None:
    scale = quality_axis("Perplexity", values)
    assert scale.log is log
    assert ("logarithmic" in scale.label) is log


def test_points_lie_where_their_values_say() -> None:
    points = (Point(0, 0, "a"), Point(5, 10, "b"), Point(10, 20, "c"))
    x, y = axis("x", [0, 10], include=(0,)), axis("y", [0, 20], include=(0,))
    (x0, y0), (x1, y1), (x2, y2) = centres(chart("t", "d", x, y, [Series("s", points)]))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x2
    assert y0 > y2


def test_what_an_axis_cannot_hold_is_left_out() -> None:
    points = tuple(Point(k, v, "") for k, v in enumerate((0.0, 1.0, math.inf, math.nan, 10.0)))
    x, y = axis("x", range(5)), axis("y", [p.y for p in points], log=True)
    assert len(centres(chart("t", "d", x, y, [Series("s", points)]))) == 2


def test_labels_never_cover_each_other() -> None:
    points = tuple(Point(1, 1 + k / 50, f"run {k}", f"label{k}") for k in range(12))
    x, y = axis("x", [0, 2]), axis("y", [0, 3])
    page = read(chart("t", "d", x, y, [Series("s", points)]))
    rows: dict[str, list[float]] = {}
    for label in page.all("text", "label"):
        rows.setdefault(label.attributes["text-anchor"], []).append(float(label.attributes["y"]))
    assert rows
    assert len(page.all("text", "label")) < len(points)
    for heights in rows.values():
        assert all(b - a >= 13.9 for a, b in pairwise(sorted(heights)))


def test_a_chart_says_in_words_what_it_shows() -> None:
    svg = chart(
        "A <b>", "It & more", axis("x", [0, 1]), axis("y", [0, 1]), [Series("s", (Point(0, 0, "tip <"),))]
    )
    page = read(svg)
    assert page.elements[0].attributes["role"] == "img"
    assert page.elements[0].attributes["aria-label"] == "A <b>. It & more"
    assert [e.text for e in page.all("title")] == ["A <b>", "tip <"]
    assert [e.text for e in page.all("desc")] == ["It & more"]


def test_fifty_series_all_look_different() -> None:
    page = read(legend([Series(str(k), (), k, k) for k in range(50)]))
    marks = [(e.attributes["d"], e.attributes["class"]) for e in page.all("path", "mark")]
    assert len(set(marks)) == 50
