"""The pictures of one run: quality against bytes, where it was cut, what each cut changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from secateur.report.layers import Stack, where
from secateur.report.markup import Markup, element, join
from secateur.report.model import Layer, Recovery, Report
from secateur.report.numbers import number, percent, percent_tick, size, size_tick
from secateur.report.page import absent, figure, prose
from secateur.report.svg import Point, Series, axis, quality_axis

__all__ = ["pictures"]


def pictures(report: Report) -> Markup:
    """Up to four figures, and a line with the reason for each that could not be drawn."""
    stack = Stack(report.layers)
    quality = _quality(report)
    if report.recovery:
        figures = [quality, _training(report.recovery)]
        return element("div", figures, class_="figures")
    amounts = (_bits if report.precision else _sparsity)(stack, wide=quality is None)
    figures = [quality, amounts, _load(report), _loss(report, stack)]
    reasons = [element("p", absent(prose(f"Not drawn: {words}."))) for words in _missing(report)]
    return join([element("div", figures, class_="figures"), reasons])


def _missing(report: Report) -> Iterator[str]:
    for key in ("perplexity_after", "perplexity_before"):
        if key in report.not_measured:
            yield f"quality against bytes, because perplexity was not measured ({report.not_measured[key]})"
            break
    if not report.layers:
        yield "sparsity and loss of each layer, because this run lists no layers"
    elif not _losses(report, Stack(report.layers)):
        reason = report.not_measured.get("layers.loss", "this run measured none")
        yield f"loss of each layer ({reason})"


def _training(recovery: Recovery) -> Markup | None:
    """Losses over the tokens that were learnt from."""
    if len(recovery.looks) < 2:
        return None
    held = tuple(
        Point(look.tokens, look.validation_loss, f"validation {number(look.validation_loss)}")
        for look in recovery.looks
    )
    trained = tuple(
        Point(look.tokens, look.loss, f"training {number(look.loss)}")
        for look in recovery.looks
        if look.loss is not None
    )
    series = [Series("validation", held, 1, 0), Series("trained on", trained, 3, 1)]
    best = min(recovery.looks, key=lambda look: look.validation_loss)
    caption = (
        f"Cross-entropy on windows that were kept back, and the loss that was trained on. Best after "
        f"{best.step} steps: {number(best.validation_loss)}, which is what was written."
    )
    y = axis("Loss, nats a token", [point.y for point in (*held, *trained)])
    return figure("Training", caption, axis("tokens", [p.x for p in held], include=(0,)), y, series)


def _quality(report: Report) -> Markup | None:
    before, after = report.perplexity_before, report.perplexity_after
    if before is None or after is None:
        return None
    dense = f"dense: perplexity {number(before)} in {size(report.bytes_before)}"
    pruned = f"pruned: perplexity {number(after)} in {size(report.bytes_after)}"
    start = Point(report.bytes_before, before, dense, f"dense {number(before)}")
    end = Point(report.bytes_after, after, pruned, f"pruned {number(after)}")
    path = tuple(Point(point.x, point.y, "") for point in (start, end))
    series = [
        Series("from dense to pruned", path, shape=None, reference=True),
        Series("dense", (start,), 7, 0, line=False),
        Series("pruned", (end,), 1, 3, line=False),
    ]
    y = quality_axis("Perplexity", (before, after))
    x = axis("bytes of weights", (start.x, end.x), show=size_tick, include=(0,))
    caption = f"Lower is better, further left is smaller: {dense}, {pruned}."
    return figure("Quality against bytes", caption, x, y, series)


def _sparsity(stack: Stack, *, wide: bool) -> Markup | None:
    if not stack.layers:
        return None
    wanted = stack.mean(lambda layer: layer.sparsity_requested)
    steps = tuple(Point(block + side, s, "") for block, s in wanted.items() for side in (-0.5, 0.5))
    means = stack.mean(lambda layer: layer.sparsity)
    reached = tuple(_reached(block, means[block], group) for block, group in stack.blocks.items())
    series = [
        Series("asked for", steps, shape=None, reference=True),
        Series("reached: mean, lowest and highest matrix", reached, 2, 0, line=False),
    ]
    values = [*wanted.values(), *(layer.sparsity for layer in stack.layers)]
    around = (max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.05))
    y = axis("Fraction removed", values, show=percent_tick, include=around)
    numbers = stack.numbers({"Asked for": {**wanted}}, lambda layer: layer.sparsity, percent)
    x = axis("block", stack.blocks, whole=True)
    return figure("Sparsity of each layer", _extremes(stack), x, y, series, numbers, wide=wide)


def _load(report: Report) -> Markup | None:
    """How evenly the experts of a block are visited, before and after."""
    if report.expert_visits is None:
        return None
    series = [
        Series(f"{name}: mean, lowest and highest block", _ranked(visits), 2 * index, index, line=False)
        for index, (name, visits) in enumerate(
            (("before", report.expert_visits.before), ("after", report.expert_visits.after))
        )
    ]
    points = [point for one in series for point in one.points]
    caption = (
        "Share of the visits that the experts of a block get on the evaluation text, the most visited first: "
        f"that one gets {percent(series[0].points[0].y)} before and {percent(series[1].points[0].y)} after."
    )
    x = axis("expert, by visits", [point.x for point in points], whole=True)
    reach = [end for point in points for end in point.span or ()]
    y = axis("Share of visits", reach, show=percent_tick, include=(0,))
    return figure("Load of the experts", caption, x, y, series)


def _ranked(visits: Mapping[int, Sequence[int]]) -> tuple[Point, ...]:
    """A point a rank, with its range over the blocks that have so many experts."""
    shares = [sorted((n / max(sum(own), 1) for n in own), reverse=True) for own in visits.values()]
    found = []
    for rank in range(max(map(len, shares))):
        each = [own[rank] for own in shares if rank < len(own)]
        mean = sum(each) / len(each)
        title = f"rank {rank + 1}: {percent(mean)}"
        found.append(Point(rank + 1, mean, title, span=(min(each), max(each))))
    return tuple(found)


def _bits(stack: Stack, *, wide: bool) -> Markup | None:
    """A line a kind of matrix; experts count with their mean."""

    def bits(layer: Layer) -> float:
        return layer.notes.get("bits", 0.0)

    series = []
    for index, (name, group) in enumerate(stack.kinds.items()):
        points = (
            Point(layer.block, bits(layer), f"{where(layer)}: {number(bits(layer))}") for layer in group
        )
        series.append(Series(name, tuple(points), index, index, small=True))
    if not series:
        return None
    y = axis("Bits of a weight", list(map(bits, stack.layers)), include=(0,))
    x = axis("block", stack.blocks, whole=True)
    numbers = stack.numbers({}, bits, number)
    return figure("Bits of each layer", "Of codes, without scales.", x, y, series, numbers, wide=wide)


def _reached(block: int, mean: float, group: list[Layer]) -> Point:
    each = ", ".join(f"{layer.matrix} {percent(layer.sparsity)}" for layer in group)
    sparsities = [layer.sparsity for layer in group]
    return Point(
        block, mean, f"block {block}: {percent(mean)} ({each})", span=(min(sparsities), max(sparsities))
    )


def _extremes(stack: Stack) -> str:
    ordered = sorted(stack.layers, key=lambda layer: layer.sparsity)
    low, high = percent(ordered[0].sparsity), percent(ordered[-1].sparsity)
    if low == high:
        return f"Every matrix reached {low}."
    return f"From {low} ({where(ordered[0])}) to {high} ({where(ordered[-1])})."


def _losses(report: Report, stack: Stack) -> list[Series]:
    """A line a kind of matrix, and one for the output of whole blocks; empty when none was measured."""
    series = []
    for index, (name, group) in enumerate(stack.kinds.items()):
        known = [(layer, layer.loss) for layer in group if layer.loss is not None]
        points = tuple(Point(la.block, loss, f"{where(la)}: {number(loss)}") for la, loss in known)
        series.append(Series(name, points, index, index, small=True))
    blocks = [(block.block, block.loss) for block in report.blocks if block.loss is not None]
    line = tuple(Point(b, loss, f"block {b} as a whole: {number(loss)}") for b, loss in sorted(blocks))
    series.append(Series("whole block", line, shape=None, reference=True))
    return [one for one in series if one.points]


def _loss(report: Report, stack: Stack) -> Markup | None:
    series = _losses(report, stack)
    if not series:
        return None
    points = [point for one in series for point in one.points]
    worst = max(points, key=lambda point: point.y)
    zeros = sum(point.y <= 0 for point in points)
    what = report.loss_definition
    caption = f"{what[:1].upper()}{what[1:]}. Largest: {worst.title}."
    caption += f" {zeros} of {len(points)} are zero and not drawn." if zeros else ""
    x = axis("block", [point.x for point in points], whole=True)
    y = axis("Loss, logarithmic", [point.y for point in points], log=True)
    losses = {block.block: block.loss for block in report.blocks}
    seconds = {block.block: block.seconds for block in report.blocks}
    columns = {"Whole block": losses, "Seconds": seconds}
    numbers = stack.numbers(columns, lambda layer: layer.loss, number)
    return figure("Loss of each layer", caption, x, y, series, numbers, wide=True)
