"""All blocks at all levels, one file a block, built in one pass over the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.driver import OpenBlock
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.pipeline.matrices import statistics_of
from secateur.pipeline.state import Run
from secateur.pipeline.ways.unit_weights import problem_of
from secateur.structure.base import SearchMethod
from secateur.structure.levels import Ladder, Version, solve, stand_in

__all__ = ["Supernet", "build_supernet"]

Versions = dict[str, dict[int, Version]]
"""By kind and level."""


@dataclass(frozen=True)
class Supernet:
    """Attributes:
    folder: of its files.
    ladders: in the order of the levels of a candidate, those of a block together.
    """

    folder: Path
    ladders: Sequence[Ladder]

    def of_block(self, index: int) -> list[Ladder]:
        return [ladder for ladder in self.ladders if ladder.block == index]

    def path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def read(self, index: int) -> Versions:
        """All versions of the matrices of a block."""
        path = self.path(index)
        tensors = read_tensors(path, read_header(path).values())
        return {
            ladder.units.kind: {
                level: Version(*(tensors[_name(ladder, level, part)] for part in Version._fields))
                for level in range(ladder.lowest, ladder.highest + 1)
            }
            for ladder in self.of_block(index)
        }

    def kept(self, ladder: Ladder, level: int) -> Tensor:
        """The units that stay at a level."""
        path, name = self.path(ladder.block), _name(ladder, level, "kept")
        return read_tensors(path, [read_header(path)[name]])[name]

    def save(self, index: int, versions: Versions) -> None:
        save_tensors(
            self.path(index),
            {
                _name(ladder, level, part): tensor
                for ladder in self.of_block(index)
                for level, version in versions[ladder.units.kind].items()
                for part, tensor in version._asdict().items()
            },
        )


def _name(ladder: Ladder, level: int, part: str) -> str:
    return f"{ladder.units.kind}.{level}.{part}"


def build_supernet(run: Run, method: SearchMethod, supernet: Supernet) -> None:
    """Write the files that are not there yet.

    Every block is observed once for all its kinds, on inputs that passed blocks which stand for all of their
    levels.

    Raises:
        OutputError: the disk is full.
    """
    blocks = run.opened.anatomy.blocks
    if all(supernet.path(block.index).exists() for block in blocks):
        return
    if run.writer:
        supernet.folder.mkdir(parents=True, exist_ok=True)
    with run.progress.task("pruning at all levels", len(blocks)) as task:
        for opened in run.driver().blocks(outputs=False):
            path = supernet.path(opened.index)
            versions = supernet.read(opened.index) if path.exists() else _solve(run, method, supernet, opened)
            _propagate(method, supernet, opened, versions)
            task.advance()
    if run.group:
        run.group.barrier()


def _solve(run: Run, method: SearchMethod, supernet: Supernet, opened: OpenBlock) -> Versions:
    own = supernet.of_block(opened.index)
    sites = {ladder.units.writer.input for ladder in own}
    observed = (
        opened.observe(method.statistics | {"hessian"}, sites=sites, record_output=False) if own else {}
    )
    versions: Versions = {}
    for ladder in own:
        inputs = statistics_of(ladder.units.writer, observed)
        problem = problem_of(opened.block, opened.parameters, ladder.units, run.recipe.seed, inputs)
        assert problem.inputs.hessian is not None
        solved = solve(ladder, method.score(problem), problem.weight, problem.inputs.hessian, method)
        versions[ladder.units.kind] = {
            level: Version(version.kept, version.weight.to("cpu", run.dtype))
            for level, version in solved.items()
        }
    if run.writer:
        supernet.save(opened.index, versions)
    return versions


def _propagate(method: SearchMethod, supernet: Supernet, opened: OpenBlock, versions: Versions) -> None:
    """Let the block stand for all of its levels, and run it."""
    for ladder in supernet.of_block(opened.index):
        new = stand_in(ladder.units, versions[ladder.units.kind], method.error_accumulation)
        if new is not None:
            _install(ladder.units.writer.view(opened.parameters), new)
    opened.finish()


def _install(view: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        view.copy_(new)
