"""A pruning run on files: from a recipe and a checkpoint to a checkpoint with its report."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.calibration.distributed import Group, local_device
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.progress import SILENT, Progress
from secateur.evaluation.memory import peak_memory_bytes
from secateur.pipeline.data import RunData, load_run_data, save_cache
from secateur.pipeline.loadable import found_to_load
from secateur.pipeline.opened import Opened, choose_device, choose_dtype, open_model
from secateur.pipeline.plans.decode_costs import DECODE, DecodeTable
from secateur.pipeline.published import add_code, copy_outer, published_files
from secateur.pipeline.record import Sizes, build_report, storage_facts, structure_facts
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.verify import verify
from secateur.pipeline.ways.table import (
    checked_method,
    measured_decode,
    most_bytes,
    observes,
    prune_blocks_of,
)
from secateur.recipe import Recipe
from secateur.report.model import Report, Stage
from secateur.runtime.kernel import highest_path
from secateur.storage.packer import packer_for

__all__ = ["prune_checkpoint"]


def prune_checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
    dense: Opened | None = None,
    stages: Sequence[Stage] = (),
) -> Report | None:
    """Prune a checkpoint folder into `out` and report what it cost.

    The source is read block by block and never changed; finished blocks are durable at once.

    Args:
        recipe: what to do.
        out: folder that does not exist, is empty, or holds an unfinished run (with `resume`).
        resume: go on where a killed run of the very same recipe stopped.
        command: the command line, for the report.
        dense: what the result is compared with and text is sampled from; by default the model of the recipe.
        stages: what was done to that model before.

    Returns:
        The report; None on every process but the first of a `torchrun`.

    Raises:
        InputError: anything about the request, the model or the text that cannot be used.
        NumericsError: a matrix without a finite solution.
    """
    started = time.perf_counter()
    recipe = recipe.validated()
    highest_path()  # what it refuses would else come after all the work, when the result is timed
    opened = open_model(recipe.model)
    dense = dense or opened
    method = checked_method(opened, recipe)
    device = local_device(choose_device(recipe.device))
    with Group.joined(device) as group:
        first = group is None or group.rank == 0
        room = most_bytes(opened, method, recipe)
        if first:
            CheckpointWriter.check(out, opened.checkpoint, resume=resume, result_bytes=room)
        cache = out / ".secateur" / "scratch"
        looks = observes(method, recipe)
        data = load_run_data(dense, recipe, progress, observes=looks, cache=cache if resume else None)
        decode = None
        if first:
            decode = measured_decode(opened, method, recipe, progress, cache if resume else None)
        decode = DecodeTable.shared(decode, group)
        marks = fingerprint(recipe, opened, data)
        pack = packer_for(recipe.format)
        writer = None
        if first:
            writer = CheckpointWriter(
                out, opened.checkpoint, marks, resume=resume, pack=pack, result_bytes=room
            )
        with writer or nullcontext():
            if writer and writer.merged:
                writer.finish()
                return Report.load(out)
            if writer:
                save_cache(data, writer.workspace)
                if decode:
                    decode.save(writer.workspace / DECODE)
            dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
            run = Run(recipe, out, opened, method, data, device, dtype, progress, group, writer, decode)
            outcome = prune_blocks_of(run)
            if writer is None:
                return None
            copy_outer(opened, writer, outcome.outer)
            folder = writer.assemble(config_updates=outcome.config_updates, dropped=outcome.dropped)
            add_code(folder)
            pruned = open_model(folder)
            if outcome.outer is None:
                pruned.share_outer(dense)
            report = _judge(run, (dense, pruned), outcome, marks, command, started)
            report = report.model_copy(update={"stages": [*stages, report.as_stage()] if stages else []})
            writer.finish(extra={**outcome.files, **published_files(report, opened)})
            return report


def _judge(
    run: Run,
    models: tuple[Opened, Opened],
    outcome: Outcome,
    marks: dict[str, Any],
    command: str,
    started: float,
) -> Report:
    """Quality and speed before and after, put down with everything else that is known of the run."""
    verdict = verify(*models, run.recipe, run.data, run.device, run.dtype, run.progress)
    return build_report(
        run.recipe.model_copy(update={"model": models[0].name}),
        run.method,
        family=run.opened.anatomy.family,
        sizes=Sizes.of(models[0].checkpoint, models[1].checkpoint, outcome.zeros),
        outcome=outcome,
        verdict=verdict,
        structure=structure_facts(models, outcome) if run.method.family in ("structure", "experts") else None,
        storage=storage_facts(models[1].checkpoint, run.recipe.format),
        calibration=run.data.calibration if observes(run.method, run.recipe) else None,
        loads_in=found_to_load(models[1], try_it=run.recipe.check_loading),
        fingerprint=marks,
        command=command,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def fingerprint(recipe: Recipe, opened: Opened, data: RunData) -> dict[str, Any]:
    """What must be equal for a killed run to go on: model, recipe, calibration, code."""
    flat: dict[str, Any] = {"secateur": secateur.__version__, "torch": torch.__version__.split("+")[0]}
    for key, value in recipe.model_dump(mode="json").items():
        nested = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": item for name, item in nested.items()} or {key: value}
    flat["model_fingerprint"] = opened.checkpoint.fingerprint()
    flat["calibration_sha256"] = data.calibration.sha256
    for name, file in (("scores", recipe.scores), ("plan", recipe.plan)):
        if file is not None:
            flat[f"{name}_sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return flat
