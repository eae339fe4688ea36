"""The weights of all units of a model, for methods that look at every block before the first is scored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from secateur.anatomy.model import Block
from secateur.anatomy.units import Units, parameters_of, producers
from secateur.core.statistics import InputStatistics
from secateur.evaluation.memory import available_memory_bytes
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.result import Group
from secateur.structure.base import UnitProblem

__all__ = ["UnitWeights", "problem_of", "problems_of", "shapes_of"]

MEMORY_FRACTION = 0.25


def problem_of(
    block: Block, parameters: Mapping[str, Tensor], units: Units, seed: int, inputs: InputStatistics
) -> UnitProblem:
    """What a method scores: units of a block with its weights, and what was observed of their input."""
    name = f"{block.index}.{units.kind}"
    weight = units.writer.view(parameters).float()
    made = producers(block, parameters, units)
    return UnitProblem(name, units, weight, inputs, generator_for(seed, name), made)


def problems_of(
    block: Block,
    parameters: Mapping[str, Tensor],
    kinds: Iterable[Units],
    seed: int,
    observed: Mapping[str, list[InputStatistics]] | None = None,
) -> Iterator[UnitProblem]:
    """The problems of one block, a kind of units each."""
    for units in kinds:
        yield problem_of(block, parameters, units, seed, statistics_of(units.writer, observed or {}))


def shapes_of(opened: Opened, groups: Sequence[Group]) -> list[UnitProblem]:
    """The problems of all units, with tensors that have shapes and no values."""
    found: list[UnitProblem] = []
    for index, units in groups:
        block = opened.anatomy.blocks[index]
        empty = {name: torch.empty(shape, device="meta") for name, shape in block.parameters.items()}
        found += problems_of(block, empty, [units], 0)
    return found


class UnitWeights(Collection[UnitProblem]):
    """The problems of all blocks, without statistics; each iteration reads the files once.

    Only matrices that belong to the units are read. As many blocks as fit into a quarter of the free memory
    stay there for the next iteration.
    """

    def __init__(self, opened: Opened, groups: Sequence[Group], seed: int, device: torch.device) -> None:
        self._opened, self._groups, self._seed, self._device = opened, groups, seed, device
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._room = MEMORY_FRACTION * available_memory_bytes()

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, item: object) -> bool:
        return any(item is problem for problem in self)

    def __iter__(self) -> Iterator[UnitProblem]:
        for index in dict.fromkeys(index for index, _ in self._groups):
            block = self._opened.anatomy.blocks[index]
            stored = self._kept.get(index) or self._read(block)
            on_device = {name: tensor.to(self._device) for name, tensor in stored.items()}
            yield from problems_of(block, on_device, self._kinds(index), self._seed)

    def _kinds(self, index: int) -> list[Units]:
        return [units for block, units in self._groups if block == index]

    def _read(self, block: Block) -> dict[str, Tensor]:
        needed = {name for units in self._kinds(block.index) for name in parameters_of(block, units)}
        layout, checkpoint = self._opened.layout, self._opened.checkpoint
        tensors = checkpoint.read(layout.block_names(block.index, needed))
        stored = layout.assemble(block.index, tensors, needed)
        size = sum(tensor.nbytes for tensor in stored.values())
        if size <= self._room:
            self._room -= size
            self._kept[block.index] = stored
        return stored
