"""`secateur methods`: the catalogue."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, print_json, show


def methods(
    name: Annotated[str | None, Parameter(help="show one method whole")] = None, /, *, json: AsJson = False
) -> None:
    """List the methods and allocations: what each removes, what it observes, its options and its paper."""
    from rich.table import Table

    import secateur

    entries = secateur.methods(name)
    if json:
        print_json({"methods": entries})
        return
    if name is None:
        table = Table("id", "family", "removes", "observes", "paper", box=None, header_style="bold")
        for entry in entries:
            table.add_row(
                entry["id"],
                entry["family"],
                entry["removes"],
                ", ".join(entry["statistics"]) or "nothing",
                entry["paper"],
            )
        show(table, "\n[dim]secateur methods NAME shows options and what to expect[/dim]")
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
