"""A pruning run on files: from a recipe and a checkpoint to a checkpoint with its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.calibration.distributed import Group, local_device
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.gradients import GradientStore
from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.checkpoint.writer import CheckpointWriter, read_part
from secateur.core.progress import SILENT, Progress
from secateur.evaluation.memory import peak_memory_bytes
from secateur.pipeline.blocks import gradients_for, prune_blocks
from secateur.pipeline.budget import (
    budget_as_json,
    budget_from_json,
    check_pattern_fits,
    method_of,
    plan_budget,
    uniform_budget,
)
from secateur.pipeline.data import RunData, load_run_data, save_cache
from secateur.pipeline.matrices import Budget
from secateur.pipeline.opened import Opened, choose_device, choose_dtype, open_model
from secateur.pipeline.record import Sizes, build_report
from secateur.pipeline.verify import verify
from secateur.recipe import Recipe
from secateur.report.card import model_card
from secateur.report.html import render
from secateur.report.model import Block, Layer, Report
from secateur.weights.base import WeightMethod

__all__ = ["prune_checkpoint"]


@dataclass
class Run:
    """What one pruning run carries from step to step; `writer` is None on all processes but the first."""

    recipe: Recipe
    out: Path
    opened: Opened
    method: WeightMethod
    data: RunData
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    group: Group | None
    writer: CheckpointWriter | None

    def driver(self, read: Callable[[int], dict[str, Tensor] | None] | None = None) -> Driver:
        """A fresh pass over the blocks; `read(i)` supplies blocks that are already pruned."""
        windows = self.data.calibration
        if self.group:
            windows = windows.shard(self.group.rank, self.group.world)
        source = self.opened.source(self.device, self.dtype, read=read)
        return Driver(source, windows, batch_size=self.recipe.calibration.batch_size, group=self.group)


def prune_checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENT,
) -> Report | None:
    """Prune a checkpoint folder into `out` and report what it cost.

    The source is read block by block and never changed; finished blocks are durable at once.

    Args:
        recipe: what to do.
        out: folder that does not exist, is empty, or holds an unfinished run (with `resume`).
        resume: go on where a killed run of the very same recipe stopped.
        command: the command line, for the report.

    Returns:
        The report; None on every process but the first of a `torchrun`.

    Raises:
        InputError: anything about the request, the model or the text that cannot be used.
        NumericsError: a matrix without a finite solution.
    """
    started = time.perf_counter()
    recipe = recipe.validated()
    opened = open_model(recipe.model)
    method = method_of(recipe)
    check_pattern_fits(opened.anatomy, method, recipe.parsed_pattern)
    device = local_device(choose_device(recipe.device))
    group = Group.from_environment(device)
    first = group is None or group.rank == 0
    if first:
        CheckpointWriter.check(out, opened.checkpoint, resume=resume)
    scratch = out / ".secateur" / "scratch"
    data = load_run_data(opened, recipe, progress, cache=scratch if resume else None)
    marks = fingerprint(recipe, opened, data)
    writer = CheckpointWriter(out, opened.checkpoint, marks, resume=resume) if first else None
    with writer or nullcontext():
        if writer and writer.merged:
            writer.finish()
            return Report.load(out)
        if writer:
            save_cache(data, writer.workspace)
        dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
        run = Run(recipe, out, opened, method, data, device, dtype, progress, group, writer)
        layers, blocks = _apply(run, scratch)
        if writer is None:
            return None
        _copy_outer(run, writer)
        report = _judge(run, writer, layers, blocks, marks, command, started)
        writer.finish(extra=_files(report, opened))
        return report


def _judge(
    run: Run,
    writer: CheckpointWriter,
    layers: list[Layer],
    blocks: list[Block],
    marks: dict[str, Any],
    command: str,
    started: float,
) -> Report:
    """Quality and speed before and after, put down with everything else that is known of the run."""
    verdict = verify(
        run.opened,
        lambda index: writer.read(part_name(index)),
        run.recipe,
        run.data,
        run.device,
        run.dtype,
        run.progress,
    )
    checkpoint = run.opened.checkpoint
    return build_report(
        run.recipe,
        run.method,
        family=run.opened.anatomy.family,
        sizes=Sizes.unchanged(checkpoint.parameters, checkpoint.nbytes, layers),
        layers=layers,
        blocks=blocks,
        verdict=verdict,
        calibration=run.data.calibration,
        fingerprint=marks,
        command=command,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _files(report: Report, opened: Opened) -> dict[str, str | bytes]:
    return {
        "report.json": report.model_dump_json(indent=2) + "\n",
        "report.html": render(report),
        "README.md": model_card(report, opened.folder),
    }


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
    done = _finished(run)
    dense = run.driver()
    gradients = gradients_for(run.method, dense, scratch, run.progress, run.group)
    budget = _budget(run, dense, gradients, scratch)
    return prune_blocks(
        run.driver(read=_reader(run, set(done))),
        run.method,
        budget,
        gradients,
        run.recipe.seed,
        run.progress,
        finished=done,
        store=lambda block: _store(run, block),
    )


def _finished(run: Run) -> dict[int, dict[str, Any]]:
    parts = dict(run.writer.parts) if run.writer else {}
    if run.group:
        parts = run.group.broadcast(parts)
    indices = range(len(run.opened.anatomy.blocks))
    return {index: parts[part_name(index)] for index in indices if part_name(index) in parts}


def _reader(run: Run, done: set[int]) -> Callable[[int], dict[str, Tensor] | None]:
    """Reads a block from the part that an earlier run wrote; None for blocks still to be pruned."""

    def read(index: int) -> dict[str, Tensor] | None:
        return read_part(run.out, part_name(index)) if index in done else None

    return read


def _store(run: Run, block: OpenBlock) -> Callable[[dict[str, Any]], None]:
    """Round the block to the dtypes of its file, so that what propagates is what is written."""
    checkpoint, layout = run.opened.checkpoint, run.opened.layout
    stored = {
        name: tensor.detach().to("cpu", torch_dtype(checkpoint.tensors[name].dtype))
        for name, tensor in layout.disassemble(block.index, block.parameters).items()
    }
    with torch.no_grad():
        for name, tensor in layout.assemble(block.index, stored).items():
            block.parameters[name].copy_(tensor)

    def keep(record: dict[str, Any]) -> None:
        if run.writer:
            run.writer.write(part_name(block.index), stored, record)

    return keep


def _copy_outer(run: Run, writer: CheckpointWriter) -> None:
    """Embeddings, norm, head and whatever belongs to no module go over unchanged."""
    names = [*run.opened.layout.outer_names(), *run.opened.layout.untouched]
    if "outer" not in writer.parts:
        writer.write("outer", run.opened.checkpoint.read(names), {})


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
