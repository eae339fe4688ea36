"""`secateur evaluate`: quality of a model, alone or against the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import AsJson, Device, DTypeName, Length, Seed, print_json, show


def evaluate(
    model: Annotated[str, Parameter(help="a folder, a hub id, or seedling")],
    /,
    *,
    against: Annotated[
        str | None, Parameter(help="the dense model: adds KL divergence and top-1 agreement")
    ] = None,
    text: Annotated[
        str | None, Parameter(help="text to judge on (.txt, .jsonl, .parquet, hub data set, or self)")
    ] = None,
    column: Annotated[str | None, Parameter(help="column that holds the text")] = None,
    windows: Annotated[int, Parameter(help="windows to evaluate")] = 128,
    length: Length = None,
    batch_size: Annotated[int | None, Parameter(help="windows a forward pass; default: what suits")] = None,
    tasks: Annotated[
        str | None, Parameter(help="tasks of lm-evaluation-harness, comma separated ([eval] extra)")
    ] = None,
    task_folder: Annotated[Path | None, Parameter(help="folder with task files of your own")] = None,
    limit: Annotated[int | None, Parameter(help="examples a task")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    json: AsJson = False,
) -> None:
    """Measure perplexity, divergence from a dense model, and tasks.

    Example: secateur evaluate pruned --against seedling --text held-out.txt
    """
    import secateur
    from secateur.cli.progress import progress_for

    result = secateur.evaluate(
        model, against=against, text=text, column=column, windows=windows, length=length,
        batch_size=batch_size,
        tasks=tasks.split(",") if tasks else None, task_folder=task_folder, limit=limit,
        seed=seed, device=device, dtype=dtype, progress=progress_for(json),  # type: ignore[arg-type]
    )  # fmt: skip
    if json:
        print_json(result)
        return
    from secateur.cli.render import evaluated

    show(*evaluated(result))
