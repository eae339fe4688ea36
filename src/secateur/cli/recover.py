"""`secateur recover`: a pruned checkpoint in, a mended one of the same shapes and its report out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import (
    AsJson,
    Device,
    DTypeName,
    Length,
    MethodOptions,
    Seed,
    parse_options,
    print_json,
    show,
)


def recover(
    model: Annotated[str, Parameter(help="the pruned model: a folder, a hub id, or seedling")],
    /,
    *,
    out: Annotated[Path, Parameter(name=["-o", "--out"], help="folder for the result: new or empty")],
    text: Annotated[
        str, Parameter(help="what to learn from: a .txt, .jsonl or .parquet file, a hub data set, or self")
    ],
    column: Annotated[str | None, Parameter(help="column of the text that holds it")] = None,
    teacher: Annotated[
        str | None, Parameter(help="the dense model: learn from its predictions, judge against it")
    ] = None,
    how: Annotated[str, Parameter(help="lora, full or refit; see: secateur methods lora")] = "lora",
    tokens: Annotated[int, Parameter(help="to learn from in all; a shorter text is read again")] = 200_000,
    length: Length = None,
    batch_size: Annotated[int, Parameter(help="windows a step")] = 8,
    learning_rate: Annotated[
        float | None, Parameter(help="the highest; default: 3e-4 lora, 2e-5 full")
    ] = None,
    rank: Annotated[int | None, Parameter(help="of LoRA; default: 8")] = None,
    validation_windows: Annotated[int, Parameter(help="kept back to choose the best weights by")] = 16,
    evaluation_text: Annotated[
        str | None, Parameter(help="held-out text; default: the first windows of the text, kept back")
    ] = None,
    evaluation_windows: Annotated[int, Parameter(help="windows to evaluate; 0 for none")] = 64,
    option: MethodOptions = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    measure_speed: Annotated[bool, Parameter(help="measure prefill and decode before and after")] = False,
    format: Annotated[str, Parameter(help="how weights are stored: dense, bitmask or nm")] = "dense",
    resume: Annotated[bool, Parameter(negative=(), help="go on where a killed run stopped")] = False,
    json: AsJson = False,
) -> None:
    """Train or refit a pruned model; shapes, names and zeros stay as they are.

    Example: secateur recover pruned -o recovered --text stories.txt --teacher seedling
    """
    from secateur.cli.progress import progress_for
    from secateur.pipeline.mending.recover import recover_checkpoint
    from secateur.recipe import RecoveryRecipe

    given = {
        "model": model, "how": how, "text": text, "column": column, "teacher": teacher, "tokens": tokens,
        "length": length, "batch_size": batch_size, "learning_rate": learning_rate, "rank": rank,
        "validation_windows": validation_windows, "options": parse_options(option),
        "evaluation_text": evaluation_text, "evaluation_windows": evaluation_windows, "seed": seed,
        "device": device, "dtype": dtype, "measure_speed": measure_speed, "format": format,
    }  # fmt: skip
    recipe = RecoveryRecipe.alone(given, "the command line")
    command = shlex.join(["secateur", *sys.argv[1:]])
    progress = progress_for(json)
    report = recover_checkpoint(recipe, out, resume=resume, command=command, progress=progress)  # type: ignore[arg-type]
    if json:
        print_json(report.model_dump(mode="json"))
        return
    from secateur.report.text import before_after

    show(before_after(report), f"written: {out}  (report.html, report.json)")
