"""What can be removed from a block as a whole, read off its axes (structured-baselines, section 2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.anatomy.cut import space_parameters
from secateur.anatomy.model import Block, Matrix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Units", "kept_spaces", "norm_over", "parameters_of", "producers", "units_of"]

HEADS, KV_HEADS = "heads", "kv_heads"


@dataclass(frozen=True)
class Units:
    """The units of one kind in one block.

    Attributes:
        kind: `ffn` (channels), `kv_groups` (a key-value head with its query heads) or `heads`.
        count: how many there are.
        parameters: what the removal of one frees.
        spaces: by space, how many of its entries belong to one unit; those of unit j are consecutive.
        writer: the matrix that writes what the units compute into the residual stream.
        width: columns of `writer` that belong to one unit.
    """

    kind: str
    count: int
    parameters: int
    spaces: Mapping[str, int]
    writer: Matrix
    width: int

    def per_unit(self, channels: Tensor) -> Tensor:
        """(count, width) from one number a column of `writer`."""
        return channels.view(self.count, self.width)

    def of_entries(self, space: str, values: Tensor) -> Tensor:
        """(count,) sums over the entries of a space that belong to each unit, from one number an entry."""
        return values.view(self.count, self.spaces[space]).sum(1)

    def others(self, units: Tensor) -> Tensor:
        """The units that are not among these, sorted int64."""
        import torch

        rest = torch.ones(self.count, dtype=torch.bool)
        rest[units] = False
        return rest.nonzero().squeeze(1)

    def columns(self, units: Tensor) -> Tensor:
        """The columns of `writer` that belong to these units, in their order."""
        import torch

        return (units[:, None] * self.width + torch.arange(self.width)).flatten()


def units_of(block: Block) -> list[Units]:
    """All kinds of units of a block: those whose output one matrix collects.

    Channels of single experts are none: experts share one space but not one importance.
    """
    found = (_units(block, matrix) for matrix in block.matrices if matrix.expert is None)
    return [units for units in found if units is not None]


def _units(block: Block, writer: Matrix) -> Units | None:
    segments = writer.columns.segments
    space = segments[0].space
    if len(segments) != 1 or space is None or not (space == HEADS or space.endswith("ffn")):
        return None
    if space != HEADS:
        return _make(space, block, writer, {space: 1})
    groups = _count(block, KV_HEADS)
    if groups is None:
        return _make(HEADS, block, writer, {HEADS: 1})
    return _make("kv_groups", block, writer, {KV_HEADS: 1, HEADS: segments[0].count // groups})


def _make(kind: str, block: Block, writer: Matrix, spaces: Mapping[str, int]) -> Units:
    first, entries = next(iter(spaces.items()))
    count = (_count(block, first) or 0) // entries
    freed = space_parameters(block, spaces)
    return Units(kind, count, freed, spaces, writer, writer.shape[1] // count)


def _count(block: Block, space: str) -> int | None:
    segments = (segment for axes in block.axes.values() for axis in axes for segment in axis.segments)
    return next((segment.count for segment in segments if segment.space == space), None)


def kept_spaces(units: Units, kept: Tensor) -> dict[str, Tensor]:
    """By space, the entries that stay when these units stay (sorted int64)."""
    import torch

    return {
        space: (kept[:, None] * entries + torch.arange(entries)).flatten()
        for space, entries in units.spaces.items()
    }


def producers(block: Block, parameters: Mapping[str, Tensor], units: Units) -> list[Tensor]:
    """(rows, d) float32 of every matrix, or part of a fused one, whose rows belong to the units."""
    return [
        matrix.view(parameters)[rows].float() for matrix in block.matrices for rows in _rows_of(matrix, units)
    ]


def parameters_of(block: Block, units: Units) -> set[str]:
    """The parameters that `units.writer` and `producers` read."""
    made = {matrix.parameter for matrix in block.matrices if _rows_of(matrix, units)}
    return made | {units.writer.parameter}


def norm_over(block: Block, units: Units) -> str | None:
    """A norm over all of the units at once, by its parameter: without some of them it gives the others
    something else. It is a module whose weight is a vector (attention sinks are no module)."""
    made = {matrix.parameter.rpartition(".")[0] for matrix in block.matrices}
    along = (
        name
        for name, axes in block.axes.items()
        if len(axes) == 1 and name.endswith(".weight") and name.rpartition(".")[0] not in made
        if any(segment.space in units.spaces for segment in axes[0].segments)
    )
    return next(along, None)


def _rows_of(matrix: Matrix, units: Units) -> list[slice]:
    """Where rows of the units lie in a matrix."""
    found, start = [], 0
    for segment in matrix.rows.segments if matrix.expert is None else ():
        if segment.space in units.spaces:
            found.append(slice(start, start + segment.size))
        start += segment.size
    return found
