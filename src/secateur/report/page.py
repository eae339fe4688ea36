"""The shell every page shares: one file, style and script inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from secateur.report.markup import Markup, Node, element, join
from secateur.report.svg import Axis, Series, chart, legend

__all__ = ["absent", "data", "facts", "figure", "page", "prose", "section", "table"]


def _resource(name: str) -> str:
    return (files("secateur.report") / name).read_text(encoding="utf-8")


def page(title: str, body: Node) -> str:
    """A complete HTML document. Its policy lets no script run but the page's own."""
    script = _resource("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_resource("template.html")).substitute(
        title=join(title), policy=digest, style=_resource("style.css"), script=script, body=join(body)
    )


def section(title: str, *children: Node, note: str = "") -> Markup:
    """A titled part of the page with an optional line under the title."""
    anchor = "-".join(title.lower().split())
    lead = element("p", note, class_="note") if note else None
    return element("section", element("h2", title, id=anchor), lead, children, aria_labelledby=anchor)


def data(text: Node, value: object) -> Markup:
    """Readable text that carries the exact value, shown on hover and used for sorting."""
    return element("data", text, value=value, title=value)


def absent(words: Node = "not measured") -> Markup:
    """A value that is not there, or the reason for it."""
    return element("span", words, class_="absent")


def table(heads: Sequence[str], rows: Sequence[Sequence[Node]], *, kind: str = "") -> Markup:
    """A table in a box that scrolls by itself. The first column names the row, numbers align right.

    `kind`: `sortable`, `stacks` (rows become cards on a narrow screen) or nothing.
    """
    columns = range(len(heads))
    align = ["n" if any(_is_number(row[c]) for row in rows) else None for c in columns]
    names = [element("button", head, type="button") if kind == "sortable" else head for head in heads]
    top = [element("th", names[c], scope="col", class_=align[c]) for c in columns]
    body = [element("tr", _row(row, align)) for row in rows]
    inner = element("table", element("thead", element("tr", top)), element("tbody", body))
    label = "Table: " + ", ".join(filter(None, heads))
    return element("div", inner, class_=f"table {kind}".strip(), tabindex=0, role="region", aria_label=label)


def _row(row: Sequence[Node], align: Sequence[str | None]) -> Node:
    cells = [element("td", cell, class_=words) for cell, words in zip(row[1:], align[1:], strict=True)]
    return [element("th", row[0], scope="row", class_=align[0]), *cells]


def _is_number(cell: Node) -> bool:
    return isinstance(cell, Markup) and cell.startswith("<data ")


def prose(text: str) -> Node:
    """A sentence whose `words in backticks` are set as code."""
    pieces = text.split("`")
    return [element("code", piece) if index % 2 else piece for index, piece in enumerate(pieces)]


def facts(pairs: Sequence[tuple[str, Node]]) -> Markup:
    """Names and values, two columns."""
    return element(
        "dl", [(element("dt", name), element("dd", value)) for name, value in pairs], class_="facts"
    )


def figure(
    title: str,
    caption: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    numbers: Markup | None = None,
    *,
    wide: bool = False,
    named: bool = True,
) -> Markup:
    """A chart with its legend (unless not `named`), a caption in words and the numbers behind it."""
    behind = (
        element("details", element("summary", "Numbers behind this picture"), numbers) if numbers else None
    )
    return element(
        "figure",
        element("figcaption", element("h3", title), element("p", caption)),
        legend(series) if named and series[1:] else None,
        element("p", y.label, class_="axis-name"),
        chart(title, caption, x, y, series, 240.0 if wide else 300.0),
        behind,
        class_="wide" if wide else None,
    )
