"""What belongs to the entries of a space: rows of one matrix with their biases, columns of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.anatomy.model import Axis, Block

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Member", "Part", "members", "members_of", "whole_members"]


@dataclass(frozen=True)
class Part:
    """Consecutive positions along one dimension of a parameter: `count` entries of `unit` positions each."""

    parameter: str
    dimension: int
    start: int
    count: int
    unit: int

    def sums(self, tensor: Tensor) -> Tensor:
        """(count,) float64: everything in a tensor shaped like the parameter, added up by entry."""
        size = self.count * self.unit
        rows = tensor.narrow(self.dimension, self.start, size).movedim(self.dimension, 0).reshape(size, -1)
        return rows.sum(1).double().view(self.count, self.unit).sum(1)


@dataclass(frozen=True)
class Member:
    """One matrix, or one segment of a fused one, along a space (structured-baselines, section 2.0).

    Attributes:
        module: path of the submodule inside the block.
        space: whose entries they are.
        parts: the weight, and the bias if the entries are rows.
    """

    module: str
    space: str
    parts: tuple[Part, ...]


def members(block: Block, spaces: Collection[str]) -> list[Member]:
    """Everything in the block that lies along these spaces, in the order of its parameters."""
    return members_of(block.axes, spaces)


def members_of(axes_of: Mapping[str, Sequence[Axis]], spaces: Collection[str]) -> list[Member]:
    """The same of any parameters, by name with their axes."""
    found: dict[tuple[str, str, int], list[Part]] = {}
    for parameter, axes in axes_of.items():
        module = parameter.rpartition(".")[0]
        for dimension, axis in enumerate(axes):
            start = 0
            for number, segment in enumerate(axis.segments):
                if segment.space is not None and segment.space in spaces:
                    part = Part(parameter, dimension, start, segment.count, segment.unit)
                    found.setdefault((module, segment.space, number), []).append(part)
                start += segment.size
    return [Member(module, space, tuple(parts)) for (module, space, _), parts in found.items()]


def whole_members(block: Block) -> list[Member]:
    """Every tensor of the block as a member with one entry: the block itself."""
    return [
        Member(name.rpartition(".")[0], "", (Part(name, 0, 0, 1, shape[0]),))
        for name, shape in block.parameters.items()
    ]
