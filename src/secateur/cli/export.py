"""`secateur export`: a checkpoint in a form that another engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, print_json, show


def export(
    model: Annotated[str, Parameter(help="a folder, a hub id, or seedling")],
    /,
    *,
    out: Annotated[Path, Parameter(name=["-o", "--out"], help="the GGUF file, or a folder for the others")],
    format: Annotated[
        str,
        Parameter(
            help="gguf (llama.cpp), dense (ordinary files: unpacked, or padded to uniform sizes), or packed: "
            "bitmask (any zeros), nm (N:M patterns)"
        ),
    ] = "gguf",
    dtype: Annotated[
        str | None, Parameter(help="of matrices in GGUF: f16, bf16, f32 or q8_0; default: as stored")
    ] = None,
    tokenizer: Annotated[bool, Parameter(help="put the tokenizer into the GGUF file")] = True,
    json: AsJson = False,
) -> None:
    """Write a checkpoint for llama.cpp, with packed weights, or as ordinary files for any other engine.

    Example: secateur export seedling -o seedling.gguf --dtype q8_0
    """
    import secateur
    from secateur.cli.progress import progress_for

    facts = secateur.export(
        model, out, format=format, dtype=dtype, tokenizer=tokenizer,
        progress=progress_for(json),  # type: ignore[arg-type]
    )  # fmt: skip
    if json:
        print_json(facts)
        return
    from secateur.cli.render import exported

    show(*exported(facts))
