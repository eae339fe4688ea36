"""`secateur methods`: the catalogue."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.cli.common import AsJson, print_json, show


def methods(
    name: Annotated[str | None, Parameter(help="show one method whole")] = None, /, *, json: AsJson = False
) -> None:
    """List the methods and allocations by family: what each observes and removes; of one also its paper and
    options."""
    from rich.table import Table

    import secateur

    entries = secateur.methods(name)
    if json:
        print_json({"methods": entries})
        return
    if name is None:
        table = Table("id", "observes", "removes", box=None, header_style="bold")
        for family, own in groupby(sorted(entries, key=_order), key=itemgetter("family")):
            table.add_row(f"[bold]{family}[/bold]")
            for entry in own:
                table.add_row(entry["id"], ", ".join(entry["statistics"]) or "nothing", entry["removes"])
        show(table, "\n[dim]secateur methods NAME shows paper, options and what to expect[/dim]")
        return
    for entry in entries:
        options = Table("option", "type", "default", "meaning", box=None, header_style="bold")
        for option in entry["options"]:
            options.add_row(option["name"], option["type"], str(option["default"]), option["description"])
        show(
            f"[bold]{entry['id']}[/bold] ({entry['family']}): {entry['summary']}",
            f"removes: {entry['removes']}",
        )
        show(
            f"observes: {', '.join(entry['statistics']) or 'nothing'}",
            f"paper: {entry['paper']} {entry['url']}",
        )
        show(f"effect: {entry['effect']}")
        if entry["options"]:
            show(options)


def _order(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["family"], entry["id"]
