"""Several stages one after the other: each prunes or mends what the one before has written, all are judged
against the dense model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree

from secateur.checkpoint.durable import write_bytes
from secateur.checkpoint.packing import DENSE
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import OutputError, RecipeError, ResumeError
from secateur.core.progress import SILENT, Progress
from secateur.pipeline.mending.recover import recover_checkpoint
from secateur.pipeline.opened import Opened, open_model
from secateur.pipeline.prune import prune_checkpoint
from secateur.recipe import Recipe, RecoveryRecipe
from secateur.report.model import FILE_NAME, Report, Stage

__all__ = ["prune_chain"]

PLAN = "stages.json"


def prune_chain(
    recipes: Sequence[Recipe | RecoveryRecipe],
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Report | None:
    """Run the stages into `out`; what lies between them is kept in `OUT.stages` until the last is done.

    Args:
        recipes: one a stage; all name the dense model.
        out, resume, command: as for `prune_checkpoint`.

    Returns:
        The report of the last stage, whose figures compare with the dense model.

    Raises:
        InputError: as `prune_checkpoint`, for any stage before the first begins where that can be known.
    """
    if len(recipes) == 1 and isinstance(recipes[0], Recipe):
        return prune_checkpoint(recipes[0], out, resume=resume, command=command, progress=progress)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("stages under torchrun", "one process", "run the stages one by one, or without it")
    recipes = [recipe.validated() for recipe in recipes]
    dense = open_model(recipes[0].model)
    between = out.with_name(f"{out.name}.stages")
    if not (resume and between.exists() and _finished(out)):
        CheckpointWriter.check(out, dense.checkpoint, resume=resume)
    _begin(between, recipes, resume)
    model, stages, report = recipes[0].model, list[Stage](), None
    for number, recipe in enumerate(recipes, 1):
        last = number == len(recipes)
        folder = out if last else between / str(number)
        checks = {key: getattr(recipe, key) and last for key in ("measure_speed", "check_loading")}
        form = recipe.format if last else DENSE
        own = recipe.model_copy(update={"model": model, "format": form, **checks})
        report = _stage(own, folder, dense, stages, resume, command, progress)
        assert report is not None  # there is one process
        stages = report.stages or [report.as_stage()]
        model = str(folder)
    rmtree(between)
    return report


def _stage(
    recipe: Recipe | RecoveryRecipe,
    folder: Path,
    dense: Opened,
    stages: Sequence[Stage],
    resume: bool,
    command: str,
    progress: Progress,
) -> Report | None:
    if resume and _finished(folder):
        return Report.load(folder)
    if isinstance(recipe, RecoveryRecipe):
        return recover_checkpoint(
            recipe, folder, resume=resume, command=command, progress=progress, dense=dense, stages=stages
        )
    return prune_checkpoint(
        recipe, folder, resume=resume, command=command, progress=progress, dense=dense, stages=stages
    )


def _finished(folder: Path) -> bool:
    return (folder / FILE_NAME).exists() and not (folder / ".secateur").exists()


def _begin(between: Path, recipes: Sequence[Recipe | RecoveryRecipe], resume: bool) -> None:
    """Note the chain, or find it as it was noted."""
    plan = json.dumps([recipe.model_dump(mode="json") for recipe in recipes], indent=1)
    noted = between / PLAN
    if between.exists() and not resume:
        raise OutputError(
            f"{between} holds an unfinished chain", "", "add --resume, or remove it, or choose another folder"
        )
    if noted.exists() and noted.read_text(encoding="utf-8") != plan:
        raise ResumeError(
            f"{between} was begun with other stages", "the same recipe", f"remove {between} to begin anew"
        )
    between.mkdir(parents=True, exist_ok=True)
    write_bytes(noted, plan.encode())
