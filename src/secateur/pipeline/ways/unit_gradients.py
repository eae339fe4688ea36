"""What the loss feels of every unit of the model, for the methods that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.anatomy.cut import residual_spaces
from secateur.anatomy.members import members, members_of, whole_members
from secateur.anatomy.units import Units
from secateur.calibration.backward import IndexedWatch
from secateur.calibration.driver import Driver
from secateur.calibration.taylor import MemberTerms, collect_taylor
from secateur.calibration.windows import Windows
from secateur.core.method import Method
from secateur.core.progress import Progress
from secateur.core.statistics import BACKWARD, Statistic
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Run
from secateur.structure.base import UnitMethod

__all__ = [
    "UnitGradients",
    "block_gradients",
    "stream_gradients",
    "unit_gradients",
    "windows_of",
    "without_blocks",
    "without_units",
]


class UnitGradients(NamedTuple):
    """Attributes:
    units: for each kind of units (`3.ffn`) and statistic (members, count) float64, the root first.
    loss: mean over the calibration windows, nats a token.
    """

    units: dict[str, dict[Statistic, Tensor]]
    loss: float


def unit_gradients(
    driver: Driver,
    method: UnitMethod,
    groups: Sequence[tuple[int, Units]],
    scratch: Path,
    progress: Progress,
    watch: IndexedWatch | None = None,
) -> UnitGradients:
    """Differentiate the model of the driver once.

    Args:
        groups: block and units of all that is wanted.
        scratch: for what does not fit into memory.
        watch: sees what enters and leaves every block.
    """
    spaces: list[set[str]] = [set() for _ in driver.source.anatomy.blocks]
    for index, units in groups:
        spaces[index] |= set(units.spaces)
    scratch.mkdir(parents=True, exist_ok=True)
    found = collect_taylor(
        driver.source,
        driver.windows,
        terms=method.statistics & BACKWARD,
        wanted=[members(block, own) for block, own in zip(driver.source.anatomy.blocks, spaces, strict=True)],
        scratch=scratch,
        progress=progress,
        group=driver.group,
        watch=watch,
    )
    return UnitGradients(
        {f"{index}.{units.kind}": _of_units(units, found.blocks[index]) for index, units in groups},
        found.loss,
    )


def stream_gradients(
    driver: Driver, method: Method, scratch: Path, progress: Progress
) -> dict[Statistic, Tensor]:
    """By statistic (members, d): what the loss feels of each entry of the residual stream, in everything that
    reads or writes it, blocks first; a tied embedding is one member (llm-pruner, sections 2.1 and 5.14)."""
    anatomy = driver.source.anatomy
    spaces = set(residual_spaces(anatomy))
    scratch.mkdir(parents=True, exist_ok=True)
    found = collect_taylor(
        driver.source,
        driver.windows,
        terms=method.statistics & BACKWARD,
        wanted=[members(block, spaces) for block in anatomy.blocks],
        outer=members_of(anatomy.outer_axes, spaces),
        scratch=scratch,
        progress=progress,
        group=driver.group,
    )
    own = [one for block in [*found.blocks, found.outer] for one in block]
    matrices = {matrix.name for block in anatomy.blocks for matrix in block.matrices}
    own.sort(key=lambda one: one.member.module in matrices)  # the root is a norm
    return {term: torch.stack([one.terms[term] for one in own]) for term in own[0].terms}


def block_gradients(
    driver: Driver, method: Method, scratch: Path, progress: Progress
) -> dict[Statistic, Tensor]:
    """By statistic (members, blocks): what the loss feels of all that a tensor of each block holds."""
    blocks = driver.source.anatomy.blocks
    scratch.mkdir(parents=True, exist_ok=True)
    found = collect_taylor(
        driver.source,
        driver.windows,
        terms=method.statistics & BACKWARD,
        wanted=[whole_members(block) for block in blocks],
        scratch=scratch,
        progress=progress,
        group=driver.group,
    )
    names = list(dict.fromkeys(name for block in blocks for name in block.parameters))
    rows = {name: number for number, name in enumerate(names)}
    terms = {
        term: torch.zeros(len(names), len(blocks), dtype=torch.float64) for term in found.blocks[0][0].terms
    }
    for index, own in enumerate(found.blocks):
        for one in own:
            for term, values in one.terms.items():
                terms[term][rows[one.member.parts[0].parameter], index] = values[0]
    return terms


def without_units(
    opened: Opened, gone: Sequence[tuple[int, Units, Tensor]]
) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks in which these units write nothing, so that neither the loss nor its gradients know of
    them."""

    def read(index: int) -> dict[str, Tensor]:
        layout = opened.layout
        whole = layout.assemble(index, opened.checkpoint.read(layout.block_names(index)))
        for block, units, removed in gone:
            if block == index:
                units.writer.view(whole)[:, units.columns(removed)] = 0
        return layout.disassemble(index, whole)

    return read


def without_blocks(opened: Opened, gone: Collection[int]) -> Callable[[int], dict[str, Tensor]]:
    """Reads a model in which these blocks add nothing to the residual stream."""

    def read(index: int) -> dict[str, Tensor]:
        layout, block = opened.layout, opened.anatomy.blocks[index]
        stored = opened.checkpoint.read(layout.block_names(index))
        if index not in gone:
            return stored
        whole = layout.assemble(index, stored)
        for matrix in block.matrices:
            if [segment.space for segment in matrix.rows.segments] == ["hidden"]:
                matrix.view(whole).zero_()
                if f"{matrix.name}.bias" in whole:
                    whole[f"{matrix.name}.bias"].zero_()
        return layout.disassemble(index, whole)

    return read


def windows_of(run: Run, number: int, size: int) -> Windows:
    """What step `number` of a method looks at: the next `size` calibration windows, or all of them."""
    calibration = run.data.calibration
    return calibration.turn(number, size) if 0 < size < len(calibration) else calibration


def _of_units(units: Units, found: Sequence[MemberTerms]) -> dict[Statistic, Tensor]:
    """(members, count) by statistic: producers along the units' own space first, the writer last."""
    first = next(iter(units.spaces))
    own = [one for one in found if one.member.space in units.spaces]
    own.sort(key=lambda one: (one.member.module == units.writer.name, one.member.space != first))
    return {
        term: torch.stack([units.of_entries(one.member.space, one.terms[term]) for one in own])
        for term in own[0].terms
    }
