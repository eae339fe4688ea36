"""Prune a model that is already in memory, in place."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.core.errors import CalibrationError
from secateur.core.progress import SILENT, Progress
from secateur.evaluation.memory import peak_memory_bytes
from secateur.evaluation.quality import perplexity, protocol_of
from secateur.pipeline.blocks import gradients_for, prune_blocks
from secateur.pipeline.budget import check_pattern_fits, method_of, plan_budget
from secateur.pipeline.data import RunData, split_run_data
from secateur.pipeline.record import Sizes, build_report
from secateur.pipeline.state import Outcome
from secateur.pipeline.verify import QUALITY_KEYS, SPEED_KEYS, Verdict
from secateur.pipeline.ways.weights import weights_observe
from secateur.recipe import MAX_DEFAULT_LENGTH, Recipe
from secateur.report.model import Layer, Report
from secateur.weights.base import WeightMethod

__all__ = ["prune_model", "prune_with_windows"]


def prune_model(model: PreTrainedModel, recipe: Recipe, *, tokenizer: Any, progress: Progress) -> Report:
    """Prune `model` in place and report what it cost.

    Args:
        model: a decoder; its weights are changed, its mode and gradients settings are not.
        tokenizer: needed where text is read or sampled.

    Raises:
        InputError: a recipe that does not fit the model.
    """
    started = time.perf_counter()
    recipe = recipe.validated()
    method = method_of(recipe)
    source = MemorySource(model)
    check_pattern_fits(source.anatomy, method, recipe.parsed_pattern)
    data = _windows(model, recipe, tokenizer, progress)
    batch_size = recipe.calibration.batch_size
    verdict = Verdict()
    if data.evaluation is not None:
        verdict.values["perplexity_before"] = perplexity(source, data.evaluation, batch_size=batch_size)
    outcome = _prune(source, recipe, method, data.calibration, progress)
    if data.evaluation is not None:
        verdict.values["perplexity_after"] = perplexity(source, data.evaluation, batch_size=batch_size)
        verdict.protocol = {**protocol_of(data.evaluation, source.dtype, tokenizer), "split": data.held_out}
    verdict.not_measured = _not_measured(verdict)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return build_report(
        recipe,
        method,
        family=source.anatomy.family,
        sizes=Sizes.unchanged(parameters, nbytes, outcome.zeros),
        outcome=outcome,
        verdict=verdict,
        calibration=data.calibration if weights_observe(method, recipe) else None,
        fingerprint={"recipe": recipe.model_dump(mode="json"), "calibration": data.calibration.sha256},
        command="secateur.prune(model, ...)",
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def prune_with_windows(
    model: PreTrainedModel, recipe: Recipe, calibration: Windows, progress: Progress = SILENT
) -> list[Layer]:
    """Prune `model` in place on windows that are at hand, and measure nothing else.

    Returns:
        One row a matrix.
    """
    recipe = recipe.validated()
    method = method_of(recipe)
    source = MemorySource(model)
    check_pattern_fits(source.anatomy, method, recipe.parsed_pattern)
    return _prune(source, recipe, method, calibration, progress).layers


def _prune(
    source: MemorySource, recipe: Recipe, method: WeightMethod, calibration: Windows, progress: Progress
) -> Outcome:
    driver = Driver(source, calibration, batch_size=recipe.calibration.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        gradients = gradients_for(method, driver, Path(scratch), progress)
        budget = plan_budget(recipe, method, driver, gradients, Path(scratch), progress)
        done = prune_blocks(driver, method, budget, gradients, recipe.seed, progress)
        return Outcome.of_weights(*done, leaves_zeros=method.leaves_zeros)


def _not_measured(verdict: Verdict) -> dict[str, str]:
    reasons = dict.fromkeys(SPEED_KEYS, "a model pruned in memory is not timed; see secateur bench")
    for key in QUALITY_KEYS:
        if key not in verdict.values:
            reasons[key] = "the dense weights are gone once a model is pruned in place"
    return reasons


def _windows(model: PreTrainedModel, recipe: Recipe, tokenizer: Any, progress: Progress) -> RunData:
    if tokenizer is None:
        raise CalibrationError("no tokenizer", "the tokenizer of the model", "give tokenizer=...")
    calibration = recipe.calibration
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", MAX_DEFAULT_LENGTH)
    length = calibration.length or min(positions, MAX_DEFAULT_LENGTH)

    def load(source: str, samples: int, column: str | None) -> Windows:
        return load_windows(
            source, tokenizer=tokenizer, samples=samples, length=length, seed=recipe.seed, column=column,
            model=lambda: model, progress=progress,
        )  # fmt: skip

    if recipe.text is not None and recipe.evaluation_windows:
        observed = load(calibration.source, calibration.samples, calibration.column)
        return RunData(
            observed, observed, load(recipe.text, recipe.evaluation_windows, None), "the text given"
        )
    spare = recipe.evaluation_windows
    windows = load(calibration.source, calibration.samples + spare, calibration.column)
    return split_run_data(windows, calibration.samples, spare)
