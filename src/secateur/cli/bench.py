"""`secateur bench`: speed and memory of a model on this machine."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, Device, DTypeName, print_json, show


def bench(
    model: Annotated[str, Parameter(help="a folder, a hub id, or seedling")],
    /,
    *,
    against: Annotated[
        str | None, Parameter(help="the dense model, measured in turn in the same run")
    ] = None,
    prompt_tokens: Annotated[int, Parameter(help="tokens of the prompt")] = 128,
    new_tokens: Annotated[int, Parameter(help="tokens to decode")] = 32,
    repeats: Annotated[int, Parameter(help="counted repeats")] = 5,
    packed: Annotated[
        bool | None,
        Parameter(help="keep weights packed in memory; by default where a kernel computes from most of them"),
    ] = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    json: AsJson = False,
) -> None:
    """Measure prefill and decode apart at batch 1 and 8: median and spread, and peak memory."""
    import secateur
    from secateur.cli.progress import progress_for

    result = secateur.bench(
        model, against=against, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
        device=device, dtype=dtype, packed=packed, progress=progress_for(json),  # type: ignore[arg-type]
    )  # fmt: skip
    if json:
        print_json(result)
        return
    from secateur.cli.render import benched

    show(*benched(result))
