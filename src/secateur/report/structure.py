"""What a smaller model costs to hold and to run, and the nearest plan in which all blocks are alike."""

from __future__ import annotations

from collections.abc import Callable

from secateur.report.markup import Markup, Node, element
from secateur.report.model import Report, Structure, Uniform
from secateur.report.numbers import change, count, number, percent, size
from secateur.report.page import data, prose, section, table

__all__ = ["nearest_words", "structure"]

MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("non_embedding_parameters", "Parameters without embeddings", count),
    ("macs_per_token", "Multiply-accumulates a token", count),
    ("kv_bytes_per_token", "Cache a token", size),
)


def structure(report: Report) -> Markup | None:
    """A section of the page, where whole units were removed."""
    facts = report.structure
    if facts is None:
        return None
    rows = [*_units(facts), *_costs(facts)]
    notes = [element("p", prose(words)) for words in _words(facts) if words]
    ratio = facts.unit_ratio()
    note = "" if ratio is None else f"Of the units {percent(ratio)} are gone, kinds weighing alike."
    return section(
        "Units and running costs", table(["", "Before", "After", "Change"], rows), *notes, note=note
    )


def nearest_words(uniform: Uniform) -> str:
    """One sentence on the nearest uniform plan."""
    widths = ", ".join(f"{width} {kind}" for kind, width in uniform.units_a_block.items())
    more = "more" if uniform.extra_loss >= 0 else "less"
    loads = "loads in the stock class" if uniform.stock else "needs the loader of secateur"
    return (
        f"The nearest plan with all blocks alike keeps {widths} in every block "
        f"({count(uniform.parameters)} parameters), {loads}, and loses {percent(abs(uniform.extra_loss))} "
        f"{more} of the scores: `-O uniform=true`."
    )


def _units(facts: Structure) -> list[list[Node]]:
    pairs = [(kind, whole, facts.units_after[kind]) for kind, whole in facts.units_before.items()]
    return [_row(f"Units: {kind}", whole, stays, count) for kind, whole, stays in pairs]


def _costs(facts: Structure) -> list[list[Node]]:
    found = [
        (label, getattr(facts, f"{key}_before"), getattr(facts, f"{key}_after"), show)
        for key, label, show in MEASURES
    ]
    return [
        _row(label, before, after, show)
        for label, before, after, show in found
        if before is not None and after is not None
    ]


def _row(label: str, before: int, after: int, show: Callable[[float], str]) -> list[Node]:
    return [label, data(show(before), before), data(show(after), after), change(before, after)]


def _words(facts: Structure) -> list[str]:
    words = []
    if facts.budget:
        own = facts.budget
        words.append(
            f"Budget: {number(own.limit)} {own.unit} allowed, {number(own.planned)} planned, "
            f"{number(own.dense)} dense."
        )
    if facts.uniform:
        words.append(nearest_words(facts.uniform))
    if facts.floors:
        words.append(f"At the floor of `min_keep`: {', '.join(facts.floors)}.")
    return words
