"""The pictures of several runs that were measured alike: quality against bytes, sparsity and speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from secateur.report.markup import Markup, element
from secateur.report.model import Protocol, Report
from secateur.report.numbers import number, percent, percent_tick, size, size_tick, tick
from secateur.report.page import figure, section
from secateur.report.runs import Run, grouped
from secateur.report.svg import Point, Series, axis, legend, quality_axis

__all__ = ["PERPLEXITY", "Looks", "facet"]


@dataclass(frozen=True)
class Measure:
    """A number of a run, and the key of it, or its value, for the dense model."""

    label: str
    key: str
    before: str | float
    show: Callable[[float], str]
    tick: Callable[[float], str] = tick

    def drawable(self, report: Report) -> float | None:
        value: float | None = getattr(report, self.key)
        return None if value is None or not math.isfinite(value) else value

    def dense(self, report: Report) -> float | None:
        value: float | None = getattr(report, self.before) if isinstance(self.before, str) else self.before
        return value


PERPLEXITY = Measure("Perplexity", "perplexity_after", "perplexity_before", number)
DIVERGENCE = Measure("KL divergence from dense, nats a token", "kl_divergence", 0.0, number)
BYTES = Measure("bytes of weights", "bytes_after", "bytes_before", size, size_tick)
SPARSITY = Measure("sparsity", "sparsity", 0.0, percent, percent_tick)
PREFILL, DECODE = (
    Measure(
        f"{w} speed, tokens a second", f"{w}_tokens_per_second_after", f"{w}_tokens_per_second_before", number
    )
    for w in ("prefill", "decode")
)
DENSE = (7, 0)
"""Colour and shape of the dense model."""


class Looks:
    """A colour for every method and a shape for every pattern, the same in all pictures."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.methods = list(dict.fromkeys(run.report.method for run in runs))
        self.shapes = list(dict.fromkeys(self._shape(run) for run in runs))

    def _shape(self, run: Run) -> tuple[str, ...]:
        return (run.report.pattern, run.report.allocation, run.report.model)

    def series(self, name: str, runs: list[Run], points: Iterable[Point], *, line: bool = False) -> Series:
        """The points of runs that share method and pattern, from left to right."""
        ordered = tuple(sorted(points, key=lambda point: (point.x, point.y)))
        colour, shape = self.methods.index(runs[0].report.method), self.shapes.index(self._shape(runs[0]))
        return Series(name, ordered, colour, shape, line=line)


def facet(runs: list[Run], title: str, looks: Looks) -> Markup:
    """A section of pictures of runs that were measured under one protocol."""
    figures = [
        _picture(runs, BYTES, PERPLEXITY, looks),
        _picture(runs, BYTES, DIVERGENCE, looks),
        _picture(runs, SPARSITY, PERPLEXITY, looks),
        *_speeds(runs, looks),
    ]
    names = [looks.series(name, group, ()) for name, group in grouped(runs, lambda run: run.series).items()]
    return section(
        title,
        legend([*names, Series("dense", (), *DENSE, line=False)]),
        element("div", figures, class_="figures"),
        note=_note(runs[0].report.protocol),
    )


def _note(protocol: Protocol | None) -> str:
    if protocol is None:
        return ""
    text = protocol.text or f"text {protocol.text_sha256[:12]}"
    numbers = "The numbers at the marks are those of the table below."
    return f"{text}, windows of {protocol.window:,} tokens, {protocol.dtype}. {numbers}"


def _speeds(runs: list[Run], looks: Looks) -> Iterator[Markup | None]:
    machines = grouped(runs, lambda run: run.machine)
    for machine, group in machines.items():
        place = f" on {', '.join(str(part) for part in machine if part)}" if len(machines) > 1 else ""
        for speed in (DECODE, PREFILL):
            yield _picture(group, speed, PERPLEXITY, looks, place)


def _picture(runs: list[Run], x: Measure, y: Measure, looks: Looks, place: str = "") -> Markup | None:
    """One figure, or nothing when no run has both numbers."""
    points = {run: point for run in runs if (point := _point(run, x, y))}
    if not points:
        return None
    dense = _dense(points, x, y)
    series = [
        looks.series(name, group, [points[run] for run in group], line=x is SPARSITY)
        for name, group in grouped(points, lambda run: run.series).items()
    ]
    places = [*points.values(), *dense]
    return figure(
        f"{_short(y)} against {_short(x)}{place}",
        _caption(runs, points, x, y),
        axis(x.label, [point.x for point in places], show=x.tick, include=(0,)),
        quality_axis(y.label, [point.y for point in places], show=y.tick),
        [*series, *([Series("dense", dense, *DENSE, line=False)] if dense else [])],
        named=False,
    )


def _short(measure: Measure) -> str:
    return measure.label.split(",")[0]


def _point(run: Run, x: Measure, y: Measure) -> Point | None:
    across, up = x.drawable(run.report), y.drawable(run.report)
    if across is None or up is None:
        return None
    words = f"{run.number}. {run.label}: {y.label} {y.show(up)}, {x.label} {x.show(across)}"
    return Point(across, up, words, str(run.number))


def _dense(runs: Iterable[Run], x: Measure, y: Measure) -> tuple[Point, ...]:
    """One mark for each dense model that was measured."""
    places = dict.fromkeys((run.report.name, x.dense(run.report), y.dense(run.report)) for run in runs)
    return tuple(
        Point(a, b, f"{name}, dense: {y.label} {y.show(b)}, {x.label} {x.show(a)}")
        for name, a, b in places
        if a is not None and b is not None
    )


def _caption(runs: list[Run], points: dict[Run, Point], x: Measure, y: Measure) -> str:
    ordered = sorted(points, key=lambda run: points[run].y)
    ends = [f"{run.label} ({y.show(points[run].y)})" for run in (ordered[0], ordered[-1])]
    side = "right" if x in (DECODE, PREFILL, SPARSITY) else "left"
    values = f"Lowest: {ends[0]}; highest: {ends[1]}." if ordered[1:] else f"{ends[0]}."
    without = [run.label for run in runs if run not in points]
    left_out = f" Not drawn, for want of a number: {', '.join(without)}." if without else ""
    return f"Lower and further {side} is better. {values}{left_out}"
