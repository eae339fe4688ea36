"""`secateur prune`: a checkpoint in, a checkpoint and its report out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from secateur.cli.common import (
    AllocationOptions,
    AsJson,
    Device,
    DTypeName,
    Length,
    MethodOptions,
    Samples,
    Seed,
    parse_options,
    print_json,
    show,
)
from secateur.core.errors import RecipeError

ModelArgument = Annotated[str | None, Parameter(help="a folder, a hub id, or seedling")]
Out = Annotated[Path, Parameter(name=["-o", "--out"], help="folder for the result: new or empty")]
MethodName = Annotated[str | None, Parameter(help="see: secateur methods")]
Sparsity = Annotated[float | None, Parameter(help="fraction of the prunable parameters to remove")]
BudgetText = Annotated[
    str | None,
    Parameter(
        help="instead of --sparsity, where heads and channels go: parameters=1.2M or bytes=900MB of the "
        "whole model, embeddings included, or decode=12ms a token; or a share of the dense model: decode=0.8x"
    ),
]
ScoresFile = Annotated[
    str | None, Parameter(help="scores.safetensors of an earlier structured run on this model")
]
PlanFile = Annotated[
    str | None, Parameter(name="--plan", help="plan.json of a structured run on this model, to be applied")
]
Storage = Annotated[
    str, Parameter(help="how weights are stored: dense, bitmask (any zeros), or nm (N:M patterns)")
]
PatternText = Annotated[str, Parameter(help="unstructured, row, matrix, global or N:M (keep N of M inputs)")]
AllocationName = Annotated[str, Parameter(help="uniform, owl or alpha")]
CalibrationSource = Annotated[
    str, Parameter(help="self (sampled from the model), a .txt, .jsonl or .parquet file, or a hub data set")
]


def prune(
    model: ModelArgument = None,
    /,
    *,
    out: Out,
    method: MethodName = None,
    sparsity: Sparsity = None,
    budget: BudgetText = None,
    pattern: PatternText = "unstructured",
    allocation: AllocationName = "uniform",
    calibration: CalibrationSource = "self",
    samples: Samples = 128,
    length: Length = None,
    column: Annotated[
        str | None, Parameter(help="column of the calibration file that holds the text")
    ] = None,
    batch_size: Annotated[int | None, Parameter(help="windows a forward pass; default: what suits")] = None,
    scores: ScoresFile = None,
    plan: PlanFile = None,
    text: Annotated[str | None, Parameter(help="held-out text for perplexity before and after")] = None,
    evaluation_windows: Annotated[int, Parameter(help="windows to evaluate; 0 for none")] = 64,
    option: MethodOptions = None,
    allocation_option: AllocationOptions = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    measure_speed: Annotated[bool, Parameter(help="measure prefill and decode before and after")] = True,
    format: Storage = "dense",
    check_loading: Annotated[bool, Parameter(help="open the result in a fresh process")] = True,
    resume: Annotated[bool, Parameter(negative=(), help="go on where a killed run stopped")] = False,
    recipe: Annotated[
        Path | None, Parameter(help="a YAML file with these settings, and stages; options given here win")
    ] = None,
    json: AsJson = False,
) -> None:
    """Prune a checkpoint, block by block, and write an ordinary checkpoint with its report.

    Example: secateur prune seedling -o pruned --method wanda --sparsity 0.5
    """
    given = {
        "model": model, "method": method, "sparsity": sparsity, "budget": budget, "pattern": pattern,
        "allocation": allocation, "plan": plan,
        "options": parse_options(option), "allocation_options": parse_options(allocation_option),
        "calibration": {
            "source": calibration, "samples": samples, "length": length, "column": column,
            "batch_size": batch_size,
        },
        "scores": scores, "text": text, "evaluation_windows": evaluation_windows, "seed": seed,
        "device": device, "dtype": dtype, "measure_speed": measure_speed, "check_loading": check_loading,
        "format": format,
    }  # fmt: skip
    recipes = build_recipes(given, recipe)

    from secateur.cli.progress import progress_for
    from secateur.pipeline.chain import prune_chain

    command = shlex.join(["secateur", *sys.argv[1:]])
    report = prune_chain(recipes, out, resume=resume, command=command, progress=progress_for(json))  # type: ignore[arg-type]
    if report is None:  # another process of the same torchrun speaks
        return
    if json:
        print_json(report.model_dump(mode="json"))
        return
    from secateur.report.text import before_after

    show(before_after(report), f"written: {out}  (report.html, report.json)")


def build_recipes(given: dict[str, Any], file: Path | None) -> Any:
    """The one stage of the command line, or those of a file with what the command line changes in them."""
    from secateur.recipe import Recipe, parse, read_recipe

    if file is not None:
        return read_recipe(file, **_changed(given))
    for key, remedy in (
        ("model", "secateur prune MODEL ..."),
        ("method", "add --method wanda; see: secateur methods"),
    ):
        if not given[key] and not (key == "method" and given["plan"]):
            raise RecipeError(f"no {key}", f"a {key}", remedy)
    return [parse(Recipe, given, "the command line")]


def _changed(given: dict[str, Any]) -> dict[str, Any]:
    """Only what differs from the defaults of a recipe."""
    from secateur.recipe import Recipe

    plain = Recipe(model="", method="").model_dump()
    changed = {key: value for key, value in given.items() if value not in (None, plain.get(key))}
    calibration = {k: v for k, v in given["calibration"].items() if v != plain["calibration"][k]}
    changed.pop("calibration", None)
    return {**changed, **({"calibration": calibration} if calibration else {})}
