"""`secateur inspect`: what a model is made of, from headers alone."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, print_json, show


def inspect(
    model: Annotated[str, Parameter(help="a folder, a hub id, or seedling")], /, *, json: AsJson = False
) -> None:
    """Show family, blocks, spaces, parameters, bytes and what can be pruned. Reads headers only."""
    import secateur

    facts = secateur.inspect(model)
    if json:
        print_json(facts)
        return
    from secateur.cli.render import inspection

    show(*inspection(facts))
