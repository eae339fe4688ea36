"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.core.errors import RecipeError

__all__ = [
    "AllocationOptions",
    "AsJson",
    "DTypeName",
    "Device",
    "Length",
    "MethodOptions",
    "Samples",
    "Seed",
    "parse_options",
    "print_json",
    "show",
]

AsJson = Annotated[
    bool, Parameter(name="--json", negative=(), help="print one JSON object to stdout and nothing else")
]
Device = Annotated[str, Parameter(help="auto, cpu, cuda or cuda:n")]
DTypeName = Annotated[
    str,
    Parameter(
        name="--dtype", help="computing precision: auto (float32 on a CPU), float32, bfloat16 or float16"
    ),
]
Seed = Annotated[int, Parameter(help="seed of sampling and random choices")]
Samples = Annotated[int, Parameter(help="calibration windows")]
Length = Annotated[
    int | None, Parameter(help="tokens a window; by default the model's maximum, at most 2048")
]
MethodOptions = Annotated[
    list[str] | None,
    Parameter(name=["-O", "--option"], negative=(), help="an option of the method, name=value; repeat it"),
]
AllocationOptions = Annotated[
    list[str] | None,
    Parameter(
        name=["-A", "--allocation-option"],
        negative=(),
        help="an option of the allocation, name=value; repeat it",
    ),
]


def parse_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["blocksize=64", "mask=wanda"]` to a dictionary; values are read as YAML scalars.

    Raises:
        RecipeError: a pair without `=`.
    """
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise RecipeError(f"option {pair!r}", "name=value", "for example -O blocksize=64")
        options[name.strip()] = yaml.safe_load(value) if value else ""
    return options


def print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def show(*renderables: Any) -> None:
    """Print rich renderables (or plain text) to stdout."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)
