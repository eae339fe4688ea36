"""The run: observe, score, plan, apply block by block, verify, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.calibration.distributed import Group
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.gradients import GradientStore, collect_gradients
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import ResumeError
from secateur.core.pattern import Pattern
from secateur.core.progress import SILENT, Progress
from secateur.evaluation.memory import peak_memory_bytes
from secateur.pipeline.budget import (
    budget_as_json,
    budget_from_json,
    check_pattern_fits,
    method_of,
    plan_budget,
    uniform_budget,
)
from secateur.pipeline.data import RunData, load_run_data, save_cache
from secateur.pipeline.matrices import Budget, prune_block
from secateur.pipeline.opened import Opened, choose_device, choose_dtype, open_model
from secateur.pipeline.verify import Verdict, verify
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer, Report
from secateur.weights.base import WeightMethod

__all__ = ["prune_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What one pruning run carries from step to step."""

    recipe: Recipe
    opened: Opened
    method: WeightMethod
    data: RunData
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    group: Group | None
    writer: CheckpointWriter | None


def prune_checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Report:
    """Prune a checkpoint folder into `out` and report what it cost.

    The source is read block by block and never changed; finished blocks are durable at once.

    Args:
        recipe: what to do.
        out: folder that does not exist, is empty, or holds an unfinished run (with `resume`).
        resume: go on where a killed run of the very same recipe stopped.
        command: the command line, for the report.

    Raises:
        InputError: anything about the request, the model or the text that cannot be used.
        NumericsError: a matrix without a finite solution.
    """
    started = time.perf_counter()
    recipe = recipe.validated()
    opened = open_model(recipe.model)
    method = method_of(recipe)
    check_pattern_fits(opened.anatomy, method, recipe.parsed_pattern)
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
    group = Group.from_environment(device)
    CheckpointWriter.check(out, opened.checkpoint, resume=resume)
    scratch = out / ".secateur" / "scratch"
    data = load_run_data(opened, recipe, progress, cache=scratch if resume else None)
    writer = None
    if group is None or group.rank == 0:
        writer = CheckpointWriter(out, opened.checkpoint, fingerprint(recipe, opened, data), resume=resume)
        save_cache(data, writer.workspace)
    run = Run(recipe, opened, method, data, device, dtype, progress, group, writer)
    layers, blocks = _apply(run, scratch)
    if writer is None:
        return Report.empty(recipe.method)
    _copy_outer(run, writer)
    verdict = verify(run.opened, writer, recipe, data, device, dtype, progress)
    report = _report(run, layers, blocks, verdict, command, time.perf_counter() - started)
    writer.finish(extra=report.files())
    return report


def fingerprint(recipe: Recipe, opened: Opened, data: RunData) -> dict[str, Any]:
    """What must be equal for a killed run to go on: model, recipe, calibration, code."""
    flat: dict[str, Any] = {"secateur": secateur.__version__, "torch": torch.__version__.split("+")[0]}
    for key, value in recipe.model_dump(mode="json").items():
        nested = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": item for name, item in nested.items()} or {key: value}
    flat["model_fingerprint"] = opened.checkpoint.fingerprint()
    flat["calibration_sha256"] = data.calibration.sha256
    return flat


def _apply(run: Run, scratch: Path) -> tuple[list[Layer], list[Block]]:
    """Prune block by block, each written before the next is opened; finished ones are only replayed."""
    done = run.writer.parts if run.writer else {}
    windows = run.data.calibration
    if run.group:
        done = run.group.broadcast(done)
        windows = windows.shard(run.group.rank, run.group.world)
    batch_size = run.recipe.calibration.batch_size
    dense = Driver(run.opened.source(run.device, run.dtype), windows, batch_size=batch_size, group=run.group)
    gradients = _gradients(run, dense, scratch)
    budget = _budget(run, dense, gradients, scratch)

    def read(index: int) -> dict[str, Tensor] | None:
        return run.writer.read(part_name(index)) if run.writer and part_name(index) in done else None

    driver = Driver(
        run.opened.source(run.device, run.dtype, read=read), windows, batch_size=batch_size, group=run.group
    )
    layers: list[Layer] = []
    blocks: list[Block] = []
    with run.progress.task(f"pruning with {run.method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in driver.blocks(forward=bool(run.method.statistics)):
            record = done.get(part_name(opened.index))
            if record is not None:
                opened.finish()
            else:
                record = _prune_open_block(run, opened, budget, gradients)
            layers += [Layer.model_validate(row) for row in record["layers"]]
            blocks.append(Block.model_validate(record["block"]))
            task.advance(note=_note(blocks[-1]))
    return layers, blocks


def _prune_open_block(
    run: Run, opened: OpenBlock, budget: Budget, gradients: GradientStore | None
) -> dict[str, Any]:
    started = time.perf_counter()
    needs = run.method.statistics - {"gradient"}
    observed = opened.observe(needs) if needs else {}
    found: Mapping[str, Tensor] = gradients.load(opened.index) if gradients else {}
    rows = prune_block(opened, run.method, budget, observed, found, run.recipe.seed)
    observed.clear()
    stored = _stored_tensors(run.opened, opened)
    loss = opened.finish()
    seconds = time.perf_counter() - started
    record = {
        "layers": [row.model_dump(mode="json") for row in rows],
        "block": Block(block=opened.index, loss=loss, seconds=seconds).model_dump(mode="json"),
    }
    if run.writer:
        run.writer.write(part_name(opened.index), stored, record)
    return record


def _stored_tensors(opened: Opened, block: OpenBlock) -> dict[str, Tensor]:
    """The block as its file will hold it; the block itself goes on with the very same rounded values."""
    in_files = opened.layout.disassemble(block.index, block.parameters)
    stored = {
        name: tensor.detach().to("cpu", opened.checkpoint.tensors[name].dtype) for name, tensor in in_files.items()
    }
    with torch.no_grad():
        for name, tensor in opened.layout.assemble(block.index, stored).items():
            block.parameters[name].copy_(tensor)
    return stored


def _copy_outer(run: Run, writer: CheckpointWriter) -> None:
    """Embeddings, norm, head and whatever belongs to no module go over unchanged."""
    names = [*run.opened.layout.outer_names(), *run.opened.layout.untouched]
    if "outer" not in writer.parts:
        writer.write("outer", run.opened.checkpoint.read(names), {})


def _gradients(run: Run, dense: Driver, scratch: Path) -> GradientStore | None:
    if "gradient" not in run.method.statistics:
        return None
    norm = getattr(run.method, "norm", "l2")
    return collect_gradients(
        dense.source, dense.windows, norm=norm, folder=scratch / "gradients", progress=run.progress, group=run.group
    )


def _budget(run: Run, dense: Driver, gradients: GradientStore | None, scratch: Path) -> Budget:
    """The budget of the journal, or a new one, which the journal then keeps."""
    asked = run.recipe.parsed_pattern
    if asked.kind != "global" and run.recipe.allocation == "uniform":
        pattern = asked.resolve(run.method.default_pattern)
        return uniform_budget(run.opened.anatomy, pattern, run.recipe.resolved_sparsity)
    noted = run.writer.notes.get("budget") if run.writer else None
    if run.group:
        noted = run.group.broadcast(noted)
    if noted is not None:
        return budget_from_json(noted)
    budget = plan_budget(run.recipe, run.method, dense, gradients, scratch, run.progress)
    if run.writer:
        run.writer.note("budget", budget_as_json(budget))
    return budget


def part_name(index: int) -> str:
    return f"block-{index:05d}"


def _note(row: Block) -> str:
    return f"loss {row.loss:.2e}" if row.loss is not None else ""
