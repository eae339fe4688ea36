"""The before/after table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.model import Report
from secateur.report.verdict import Outcome, Row, rows, verdict

__all__ = ["before_after"]

_STYLES: dict[Outcome, str] = {"better": "green", "worse": "red", "same": "dim", "": ""}


def before_after(report: Report) -> RenderableType:
    """Verdict, table, effect and warnings; colours repeat what the words say. Nothing is printed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("Before", justify="right")
    table.add_column("After", justify="right")
    table.add_column("Change")
    for row in rows(report):
        table.add_row(*_cells(row))
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    fallbacks = [
        Text(f"done differently in {len(layers)} of {len(report.layers)} matrices: {phrase}", style="yellow")
        for phrase, layers in report.fallbacks()
    ]
    loads = [
        Text(f"loads in {name}", "bold").append(f"  {answer}", "") for name, answer in report.loads_in.items()
    ]
    return Group(
        Text(verdict(report)), Text(), table, Text(), Text(report.effect), *loads, *warnings, *fallbacks
    )


def _cells(row: Row) -> list[Text]:
    """Text objects, because names and reasons may hold what rich would read as markup."""
    before, after = row.cells()
    if row.reason:
        return [Text(row.label), Text(before, "dim"), Text(after, "dim"), Text(row.reason, "dim")]
    words = ", ".join(filter(None, (row.change, row.outcome)))
    return [Text(row.label), Text(before), Text(after), Text(words, _STYLES[row.outcome])]
