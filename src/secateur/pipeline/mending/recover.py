"""From a pruned checkpoint to a mended one of the same shapes, with its report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import RecipeError
from secateur.core.progress import SILENT, Progress
from secateur.pipeline.data import save_cache
from secateur.pipeline.mending.data import RecoveryData, load_recovery_data
from secateur.pipeline.mending.report import earlier_stages, recovery_report
from secateur.pipeline.mending.training import Mending, check_mending, mend
from secateur.pipeline.opened import Opened, choose_device, open_model
from secateur.pipeline.published import add_code, copy_outer, published_files
from secateur.recipe import RecoveryRecipe
from secateur.report.model import Report, Stage
from secateur.storage.packer import packer_for

__all__ = ["recover_checkpoint"]

NO_TEACHER = "none"


def recover_checkpoint(
    recipe: RecoveryRecipe,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
    dense: Opened | None = None,
    stages: Sequence[Stage] = (),
) -> Report:
    """Mend a pruned checkpoint into `out` and report what it brought.

    Names, shapes and dtypes of the tensors are those of the source, which is never changed.

    Args:
        recipe: what to do.
        out: folder that does not exist, is empty, or holds an unfinished run (with `resume`).
        resume: go on where a killed run of the very same recipe stopped.
        command: the command line, for the report.
        dense: of a chain: what the result is judged against, what text is sampled from, and the teacher
            unless the recipe names one.
        stages: of a chain: what was done before; else the report beside the model says so.

    Returns:
        The report.

    Raises:
        InputError: anything about the request, the models or the text that cannot be used.
        NumericsError: a loss or a least-squares problem that is not finite.
    """
    started = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("recover under torchrun", "one process", "run it without: several GPUs are used")
    recipe = recipe.validated()
    opened = open_model(recipe.model)
    teacher = _teacher(recipe, dense)
    job = Mending(recipe, opened, teacher, recipe.recover.method(), choose_device(recipe.device), progress)
    check_mending(job)
    CheckpointWriter.check(out, opened.checkpoint, resume=resume)
    judge = dense or teacher or opened
    cache = out / ".secateur" / "scratch"
    data = load_recovery_data(judge, recipe, progress, cache if resume else None)
    marks = _fingerprint(job, data)
    pack = packer_for(recipe.format)
    with CheckpointWriter(out, opened.checkpoint, marks, resume=resume, pack=pack) as writer:
        if writer.merged:
            writer.finish()
            return Report.load(out)
        save_cache(data.run, writer.workspace)
        mended = mend(job, data, writer)
        copy_outer(opened, writer)
        folder = writer.assemble()
        add_code(folder)
        recovered = open_model(folder)
        before = list(stages) or earlier_stages(opened)
        report = recovery_report(job, data, mended, (judge, recovered), before, marks, command, started)
        writer.finish(extra=published_files(report, opened))
        return report


def _teacher(recipe: RecoveryRecipe, dense: Opened | None) -> Opened | None:
    name = recipe.recover.teacher
    if name is None:
        return dense
    return None if name == NO_TEACHER else open_model(name)


def _fingerprint(job: Mending, data: RecoveryData) -> dict[str, Any]:
    """What must be equal for a killed run to go on: models, recipe, text, code."""
    flat: dict[str, Any] = {"secateur": secateur.__version__, "torch": torch.__version__.split("+")[0]}
    for key, value in job.recipe.model_dump(mode="json").items():
        nested = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": item for name, item in nested.items()} or {key: value}
    flat["model_fingerprint"] = job.opened.checkpoint.fingerprint()
    flat["teacher_fingerprint"] = job.teacher.checkpoint.fingerprint() if job.teacher else None
    flat["training_sha256"], flat["validation_sha256"] = data.training.sha256, data.validation.sha256
    return flat
