"""`secateur plan`: what a run will need and what its result will be good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from secateur.cli.common import (
    AllocationOptions,
    AsJson,
    Device,
    DTypeName,
    Length,
    MethodOptions,
    Samples,
    parse_options,
    print_json,
    show,
)
from secateur.cli.prune import (
    AllocationName,
    BudgetText,
    MethodName,
    ModelArgument,
    PatternText,
    PlanFile,
    ScoresFile,
    Sparsity,
    Storage,
    build_recipes,
)


def plan(
    model: ModelArgument = None,
    /,
    *,
    method: MethodName = None,
    sparsity: Sparsity = None,
    budget: BudgetText = None,
    pattern: PatternText = "unstructured",
    allocation: AllocationName = "uniform",
    scores: ScoresFile = None,
    plan_file: PlanFile = None,
    samples: Samples = 128,
    length: Length = None,
    format: Storage = "dense",
    option: MethodOptions = None,
    allocation_option: AllocationOptions = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    recipe: Annotated[
        Path | None, Parameter(help="a YAML file with these settings; options given here win")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show bytes, peak memory and time of a run before a weight is read, and whether it will be faster."""
    given = {
        "model": model, "method": method, "sparsity": sparsity, "budget": budget, "pattern": pattern,
        "allocation": allocation, "scores": scores, "plan": plan_file,
        "options": parse_options(option), "allocation_options": parse_options(allocation_option),
        "calibration": {"samples": samples, "length": length}, "device": device, "dtype": dtype,
        "format": format,
    }  # fmt: skip
    recipes = build_recipes(given, recipe)

    import secateur
    from secateur.recipe import Recipe

    cuts = [parsed for parsed in recipes if isinstance(parsed, Recipe)]  # what recovers changes no size
    stages = [secateur.plan(**parsed.model_dump()) for parsed in cuts]
    if json:
        print_json(stages[0] if len(stages) == 1 else {"stages": stages})
        return
    from secateur.cli.render import planned

    for facts in stages:
        show(*planned(facts))
