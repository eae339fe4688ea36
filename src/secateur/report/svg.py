"""Small charts as inline SVG, coloured by the style sheet: light, dark and print come from one drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from secateur.report.markup import Markup, element
from secateur.report.numbers import tick as plain

__all__ = ["Axis", "Point", "Series", "axis", "chart", "legend", "quality_axis"]

WIDTH = 640.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 14.0, 12.0, 48.0
SHAPES = (
    "M0-4.2A4.2 4.2 0 1 1 0 4.2A4.2 4.2 0 1 1 0-4.2Z",
    "M-3.7-3.7H3.7V3.7H-3.7Z",
    "M0-5L4.8 3.6H-4.8Z",
    "M0-5.2L5.2 0 0 5.2-5.2 0Z",
    "M0 5L4.8-3.6H-4.8Z",
    "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "M0-5L4.8-1.5 3 4.1H-3L-4.8-1.5Z",
)
COLOURS = 8


@dataclass(frozen=True)
class Point:
    """`title`: tooltip; `label`: text beside the mark where there is room; `span`: a bar through it."""

    x: float
    y: float
    title: str
    label: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points with one look. `colour` and `shape` wrap around; a `reference` is drawn dashed and grey.

    `shape` None draws no marks, `small` marks are for many points.
    """

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    shape: int | None = 0
    line: bool = True
    reference: bool = False
    small: bool = False

    @property
    def classes(self) -> str:
        return "reference" if self.reference else f"c{self.colour % COLOURS}"


@dataclass(frozen=True)
class Axis:
    """A scale from values to 0..1 with its ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    show: Callable[[float], str] = plain

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)


def axis(
    label: str,
    values: Iterable[float],
    *,
    log: bool = False,
    show: Callable[[float], str] = plain,
    include: Sequence[float] = (),
    whole: bool = False,
) -> Axis:
    """An axis around the drawable `values` and all of `include`, with room at both ends.

    `whole`: only integers are ticks, and the range ends at the values themselves.
    """
    kept = [v for v in (*values, *include) if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(kept), max(kept)
    if log:
        low, high = low / 1.25, high * 1.25
        return Axis(label, low, high, _log_ticks(low, high), True, show)
    room = 0.6 if whole else (high - low) * 0.07 or abs(high) * 0.1 or 1.0
    floor = min(include, default=math.nan)
    low, high = (low if low == floor else low - room), high + room
    return Axis(label, low, high, _linear_ticks(low, high, whole), False, show)


def quality_axis(label: str, values: Sequence[float], show: Callable[[float], str] = plain) -> Axis:
    """From zero, or logarithmic (and named so) when the values span more than a factor of five."""
    drawable = [value for value in values if math.isfinite(value)] or [1.0]
    smallest = min((value for value in drawable if value > 0), default=0.0)
    if 0 < smallest * 5 < max(drawable):
        return axis(f"{label}, logarithmic", values, log=True, show=show)
    return axis(label, values, show=show, include=(0,))


def _linear_ticks(low: float, high: float, whole: bool) -> tuple[float, ...]:
    rough = (high - low) / (6 if whole else 5)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    step = max(1, math.ceil(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    return tuple(k * step for k in range(first, math.floor(high / step + 1e-9) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    skip = max(1, math.ceil(len(decades) / 7))
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades if d % skip == 0 for m in multiples]
        inside = tuple(t for t in ticks if low <= t <= high)
        if len(inside) >= 3:
            return inside
    return tuple(t for t in _linear_ticks(low, high, False) if t > 0)


def chart(
    title: str, description: str, x: Axis, y: Axis, series: Sequence[Series], height: float = 300.0
) -> Markup:
    """The drawing; `description` says in words what it shows, for those who cannot see it.

    Points that an axis cannot hold (zero on a logarithmic one, infinite values) are left out.
    """
    frame = _Frame(x, y, height)
    marks = [frame.draw(one) for one in series]
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        frame.grid(),
        marks,
        frame.labels(series),
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def legend(series: Sequence[Series]) -> Markup:
    """A list of names with their marks, outside the drawing so that it wraps on a narrow screen."""
    return element("ul", [_legend_entry(one) for one in series], class_="legend")


def _legend_entry(series: Series) -> Markup:
    dash = element("path", d="M-12 0H12", class_=f"line {series.classes}") if series.line else None
    mark = element("path", d=_shape(series.shape), class_=f"mark {series.classes}")
    picture = element(
        "svg", dash, mark if series.shape is not None else None, viewBox="-13 -7 26 14", aria_hidden="true"
    )
    return element("li", picture, series.name)


def _shape(shape: int | None) -> str:
    return SHAPES[(shape or 0) % len(SHAPES)]


class _Frame:
    """Where values lie inside the drawing."""

    def __init__(self, x: Axis, y: Axis, height: float) -> None:
        self.x, self.y, self.bottom = x, y, height - BOTTOM

    def at(self, point: Point) -> tuple[float, float]:
        across = LEFT + self.x.place(point.x) * (WIDTH - LEFT - RIGHT)
        down = TOP + (1 - self.y.place(point.y)) * (self.bottom - TOP)
        return round(across, 1), round(down, 1)

    def visible(self, series: Series) -> list[tuple[Point, float, float]]:
        kept = [p for p in series.points if self.x.holds(p.x) and self.y.holds(p.y)]
        return [(point, *self.at(point)) for point in kept]

    def draw(self, series: Series) -> Markup:
        placed = self.visible(series)
        line = None
        if series.line and len(placed) > 1:
            path = "M" + "L".join(f"{px:g} {py:g}" for _, px, py in placed)
            line = element("path", d=path, class_=f"line {series.classes}")
        marks = [
            element(
                "path",
                element("title", point.title),
                d=_shape(series.shape),
                transform=f"translate({px:g} {py:g})" + (" scale(.6)" if series.small else ""),
                class_=f"mark {series.classes}",
            )
            for point, px, py in placed
            if series.shape is not None
        ]
        return element("g", line, [self.bar(point, series) for point, _, _ in placed], marks)

    def bar(self, point: Point, series: Series) -> Markup | None:
        if point.span is None:
            return None
        (px, low), (_, high) = (self.at(Point(point.x, end, "")) for end in point.span)
        return element("path", d=f"M{px:g} {low:g}V{high:g}", class_=f"bar {series.classes}")

    def grid(self) -> Markup:
        right, bottom = WIDTH - RIGHT, self.bottom
        parts = []
        for tick in self.y.ticks:
            down = round(TOP + (1 - self.y.place(tick)) * (bottom - TOP), 1)
            parts.append(element("path", d=f"M{LEFT:g} {down:g}H{right:g}", class_="grid"))
            parts.append(element("text", self.y.show(tick), x=LEFT - 8, y=down, class_="tick y"))
        for tick in self.x.ticks:
            across = round(LEFT + self.x.place(tick) * (right - LEFT), 1)
            parts.append(element("path", d=f"M{across:g} {bottom:g}v5", class_="axis"))
            parts.append(element("text", self.x.show(tick), x=across, y=bottom + 22, class_="tick x"))
        parts.append(element("path", d=f"M{LEFT:g} {bottom:g}H{right:g}", class_="axis"))
        parts.append(element("text", self.x.label, x=right, y=bottom + 43, class_="name"))
        return element("g", parts, aria_hidden="true")

    def labels(self, series: Sequence[Series]) -> Markup:
        """Labels right, left, above or below their mark, or nowhere when all four places are taken."""
        placed = [entry for one in series for entry in self.visible(one)]
        taken = [(px - 5, py - 5, px + 5, py + 5) for point, px, py in placed if point.title]
        texts = []
        for point, px, py in placed:
            wide = 9 * len(point.label)
            spots = (
                ("start", px + 8, py - 7),
                ("end", px - 8, py - 7),
                ("middle", px, py - 21),
                ("middle", px, py + 7),
            )
            for anchor, at, top in spots if point.label else ():
                left = at - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
                box = (left, top, left + wide, top + 14)
                if self.inside(box) and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    y = f"{top + 12:g}"
                    texts.append(element("text", point.label, x=at, y=y, text_anchor=anchor, class_="label"))
                    break
        return element("g", texts, aria_hidden="true")

    def inside(self, box: tuple[float, float, float, float]) -> bool:
        return box[0] >= LEFT and box[1] >= 0 and box[2] <= WIDTH and box[3] <= self.bottom


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
