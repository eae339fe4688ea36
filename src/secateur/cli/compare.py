"""`secateur compare`: several runs in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, print_json, show


def compare(
    *runs: Annotated[Path, Parameter(help="folders written by secateur prune, or their report.json")],
    out: Annotated[Path, Parameter(name=["-o", "--out"], help="the page to write")] = Path("compare.html"),
    json: AsJson = False,
) -> None:
    """Draw quality against bytes and speed of several runs in one page.

    Example: secateur compare pruned-wanda pruned-sparsegpt -o compare.html
    """
    import secateur

    rows = secateur.compare(list(runs), out)
    if json:
        print_json({"out": str(out), "runs": rows})
        return
    from secateur.cli.render import compared

    show(compared(rows), f"written: {out}")
