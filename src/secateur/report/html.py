"""report.html: one run on one page that opens offline."""

from __future__ import annotations

from secateur.report.details import details
from secateur.report.layers import merge_experts
from secateur.report.markup import Markup, Node, element
from secateur.report.model import Layer, Report
from secateur.report.numbers import number, percent
from secateur.report.page import absent, data, page, prose, section, table
from secateur.report.plots import pictures
from secateur.report.structure import structure
from secateur.report.verdict import Outcome, Row, rows, verdict

__all__ = ["FILE_NAME", "chip", "render"]

FILE_NAME = "report.html"
MOST_ROWS = 2000
_MARKS: dict[Outcome, str] = {"better": "▲", "worse": "▼", "same": "●"}


def render(report: Report) -> str:
    """The page as a string of HTML. It loads nothing and escapes every name."""
    return page(
        f"{report.name} · {report.title} · secateur",
        [
            _header(report),
            _notices(report),
            section("Before and after", _before_after(report)),
            structure(report),
            section("Pictures", pictures(report)),
            _matrices(report),
            _repeat(report),
            details(report),
        ],
    )


def chip(outcome: Outcome) -> Markup | None:
    """The outcome as a mark, a word and a colour, so that it reads without the colour."""
    return element("span", f"{_MARKS[outcome]} {outcome}", class_=f"chip {outcome}") if outcome else None


def _header(report: Report) -> Markup:
    tags = [
        report.method,
        report.pattern,
        _amount(report),
        f"{report.allocation} allocation",
    ]
    if report.recovery:
        tags[1:] = [report.pattern, f"{report.recovery.tokens:,} tokens"]
    return element(
        "header",
        element(
            "p",
            "secateur report · ",
            element("time", f"{report.date:%d %B %Y}", datetime=report.date.isoformat()),
        ),
        element("h1", report.name),
        element("ul", [element("li", tag) for tag in tags], class_="tags"),
        element("p", verdict(report), class_="verdict"),
        element("p", prose(report.effect), class_="effect"),
    )


def _amount(report: Report) -> str:
    if report.precision:
        return f"{report.precision.stored_bits_matrices or 0:.2f} bits a weight"
    return f"{percent(report.sparsity)} removed"


def _notices(report: Report) -> Markup | None:
    """Warnings and fallbacks in plain words, or nothing."""
    fallbacks = [_fallback(phrase, layers, len(report.layers)) for phrase, layers in report.fallbacks()]
    warnings = [element("li", prose(warning)) for warning in report.warnings]
    if not fallbacks and not warnings:
        return None
    lists = (("Warnings", warnings), ("Done differently than asked", fallbacks))
    parts = [(element("h3", title), element("ul", items)) for title, items in lists if items]
    return element("aside", parts, aria_label="Warnings and fallbacks")


def _fallback(phrase: str, layers: list[Layer], total: int) -> Markup:
    names = [f"{layer.block}.{layer.matrix}" for layer in layers]
    shown = ", ".join(names[:4]) + (
        f" and {len(names) - 4} more, marked in the table below" if names[4:] else ""
    )
    return element(
        "li", prose(phrase), element("span", f" {len(names)} of {total} matrices: {shown}", class_="where")
    )


def _before_after(report: Report) -> Markup:
    return table(["", "Before", "After", "Change", ""], [_cells(row) for row in rows(report)], kind="stacks")


def _cells(row: Row) -> list[Node]:
    values = (None if row.against_dense else row.before, row.after)
    shown: list[Node] = [
        absent(text) if value is None else data(text, value)
        for text, value in zip(row.cells(), values, strict=True)
    ]
    if row.reason:
        return [row.label, *shown, absent(prose(row.reason)), None]
    return [row.label, *shown, row.change, chip(row.outcome)]


def _matrices(report: Report) -> Markup | None:
    if not report.layers:
        return None
    merged = len(report.layers) > MOST_ROWS
    layers = merge_experts(report.layers) if merged else report.layers
    note = f"{len(layers):,} rows. Choose a column to sort by it; loss is the {report.loss_definition}."
    if merged:
        note += (
            f" Experts of a block are joined into their mean; report.json lists all {len(report.layers):,}."
        )
    heads = ["Matrix", "Block", "Shape", "Asked for", "Reached", "Loss", "Seconds"]
    cells = [_matrix(layer) for layer in layers]
    for head, cell in (("Notes", _notes), ("Done differently", _fallbacks)):
        column = [cell(layer) for layer in layers]
        if any(column):
            heads.append(head)
            cells = [[*row, words] for row, words in zip(cells, column, strict=True)]
    return section("Every matrix", table(heads, cells, kind="sortable"), note=note)


def _notes(layer: Layer) -> Node:
    return [(data(f"{name} {number(value)}", value), " ") for name, value in layer.notes.items()]


def _fallbacks(layer: Layer) -> Node:
    return "; ".join(layer.fallbacks)


def _matrix(layer: Layer) -> list[Node]:
    return [
        layer.matrix,
        data(str(layer.block), layer.block),
        data(f"{layer.rows:,} × {layer.columns:,}", layer.rows * layer.columns),
        data(percent(layer.sparsity_requested), layer.sparsity_requested),
        data(percent(layer.sparsity), layer.sparsity),
        data(number(layer.loss), layer.loss) if layer.loss is not None else absent(),
        data(number(layer.seconds), layer.seconds) if layer.seconds is not None else absent(),
    ]


def _repeat(report: Report) -> Markup:
    copy = element("button", "Copy", type="button", class_="copy", hidden=True)
    return section(
        "The command", element("div", element("pre", element("code", report.command)), copy, class_="command")
    )
