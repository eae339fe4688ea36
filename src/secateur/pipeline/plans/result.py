"""What a structured run will write, known from the units that stay: shapes, configuration, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor

from secateur.anatomy.cut import cut_shapes, space_parameters
from secateur.anatomy.model import Anatomy, Shape
from secateur.anatomy.resized import is_stock, resized_config
from secateur.anatomy.resolve import resolve_config
from secateur.anatomy.units import Units, kept_spaces
from secateur.pipeline.opened import Opened
from secateur.structure.base import UnitMethod

__all__ = ["Group", "Result", "element_bytes", "new_biases", "unit_bytes"]

Group = tuple[int, Units]
"""A block and the units of one kind in it."""


@dataclass(frozen=True)
class Result:
    """A model without the units that go.

    Attributes:
        opened: the model before.
        groups: all units.
        kept: by block and space, the entries that stay.
        sizes: their numbers.
        biases: matrices that get a bias which they did not have.
    """

    opened: Opened
    groups: Sequence[Group]
    kept: Sequence[Mapping[str, Tensor]]
    sizes: Sequence[Mapping[str, int]]
    biases: Sequence[str]

    @classmethod
    def of(
        cls, opened: Opened, groups: Sequence[Group], kept: Sequence[Tensor], biases: Sequence[str]
    ) -> Result:
        """The result when of each group these units stay."""
        spaces: list[dict[str, Tensor]] = [{} for _ in opened.anatomy.blocks]
        for (index, units), stays in zip(groups, kept, strict=True):
            spaces[index] |= kept_spaces(units, stays)
        sizes = [{space: len(at) for space, at in own.items()} for own in spaces]
        return cls(opened, groups, spaces, sizes, biases)

    @cached_property
    def config_updates(self) -> dict[str, Any]:
        """Keys of config.json that change.

        Raises `AnatomyError` for sizes that no class of this family can have.
        """
        anatomy = self.opened.anatomy
        config = self.opened.checkpoint.config
        return resized_config(config, anatomy, self.sizes, self._shapes(), self.biases)

    @cached_property
    def anatomy(self) -> Anatomy:
        return resolve_config({**self.opened.checkpoint.config, **self.config_updates})

    @property
    def stock(self) -> bool:
        """Whether transformers loads it with a class of its own."""
        return is_stock({**self.opened.checkpoint.config, **self.config_updates})

    @cached_property
    def parameters(self) -> int:
        """Of all its files."""
        return self.opened.checkpoint.parameters - sum(map(self._fewer, range(len(self.sizes))))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        indices = range(len(self.sizes))
        fewer = sum(self._fewer(index, element_bytes(self.opened, index)) for index in indices)
        return self.opened.checkpoint.dense_nbytes - fewer

    def _shapes(self) -> list[dict[str, Shape]]:
        pairs = zip(self.opened.anatomy.blocks, self.sizes, strict=True)
        return [cut_shapes(block, own) for block, own in pairs]

    def _fewer(self, index: int, weights: Mapping[str, int] | None = None) -> int:
        """Elements (times their weights) that block `index` loses, less those of biases it gets."""
        before, after = (anatomy.blocks[index].parameters for anatomy in (self.opened.anatomy, self.anatomy))
        lost = sum(prod(shape) * (weights[name] if weights else 1) for name, shape in before.items())
        return lost - sum(
            prod(shape) * (weights[name if name in weights else _beside(name)] if weights else 1)
            for name, shape in after.items()
        )


def _beside(bias: str) -> str:
    """The weight that a new bias lies beside and takes its dtype from."""
    return f"{bias.removesuffix('bias')}weight"


def new_biases(opened: Opened, groups: Sequence[Group], method: UnitMethod) -> list[str]:
    """Matrices that get a bias which no block has yet, the same in all blocks."""
    if method.compensate != "bias":
        return []
    there = {name for block in opened.anatomy.blocks for name in block.parameters}
    return sorted({units.writer.name for _, units in groups if f"{units.writer.name}.bias" not in there})


def element_bytes(opened: Opened, index: int) -> dict[str, int]:
    """By name inside block `index`, the bytes of one element of each tensor in the files."""
    tensors, layout = opened.checkpoint.tensors, opened.layout
    first = {
        name: tensors[layout.names_of(index, name)[0]] for name in opened.anatomy.blocks[index].parameters
    }
    return {name: info.nbytes // max(info.numel, 1) for name, info in first.items()}


def unit_bytes(opened: Opened, group: Group) -> int:
    """What the removal of one unit frees in the files."""
    index, units = group
    return space_parameters(opened.anatomy.blocks[index], units.spaces, element_bytes(opened, index))
