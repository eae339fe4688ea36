"""The verbs as plain functions, on folders or on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.core.progress import SILENT, Progress
from secateur.pipeline.prune import prune_checkpoint
from secateur.pipeline.prune_memory import prune_model
from secateur.recipe import Recipe, parse
from secateur.report.model import Report

__all__ = ["prune"]


def prune(
    model: str | Path | PreTrainedModel,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Report:
    """Prune a checkpoint into a folder, or a model in memory in place.

    Args:
        model: local folder, hub id, `seedling`, or a loaded `PreTrainedModel`.
        out: folder for the result (for a folder or hub id).
        tokenizer: of a loaded model, where text is read; `self` calibration needs none.
        resume: go on where a killed run stopped.
        settings: fields of `Recipe`: method, sparsity, pattern, allocation, options, calibration, ...
            `calibration` may be a source (`"self"`, a path) or a dictionary of `Calibration` fields.

    Returns:
        The report, as it is also written to `out`/report.json.

    Raises:
        InputError: whatever cannot be used, in one line.

    >>> import secateur
    >>> report = secateur.prune("seedling", "pruned", method="wanda", sparsity=0.5)  # doctest: +SKIP
    """
    calibration = settings.get("calibration")
    if isinstance(calibration, (str, Path)):
        settings["calibration"] = {"source": str(calibration)}
    if isinstance(model, PreTrainedModel):
        recipe: Recipe = parse(Recipe, {"model": model.config.name_or_path or "in memory", **settings}, "the settings")
        return prune_model(model, recipe, tokenizer=tokenizer, progress=progress)
    from secateur.core.errors import OutputError

    if out is None:
        raise OutputError("no output folder", "a folder for the result", "give out='pruned'")
    recipe = parse(Recipe, {"model": str(model), **settings}, "the settings")
    command = f"secateur.prune({str(model)!r}, {str(out)!r}, ...)"
    return prune_checkpoint(recipe, Path(out), resume=resume, command=command, progress=progress)
