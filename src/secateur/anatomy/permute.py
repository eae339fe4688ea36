"""Reorder channels inside one block without changing what the block computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.anatomy.model import Axis, Block, Matrix, Segment

__all__ = ["Reorder", "permute", "reorder_of"]

VALUES = "value_dim"


@dataclass(frozen=True)
class Reorder:
    """The freedom of a matrix to have its inputs in another order, folded into what produces them.

    Inputs are (parts, together, width): every part has an order of its own over `width` places, which the
    `together` heads that read one value head share.

    Attributes:
        space: of the channels, or of the value heads.
        inside: the order is one inside the units of the space, not of the units.
    """

    space: str
    parts: int
    together: int
    width: int
    inside: bool

    def columns(self, orders: Tensor) -> Tensor:
        """(parts * together * width,) int64 order of all inputs, from (parts, width)."""
        return _shifted(orders, self.together)


def reorder_of(block: Block, matrix: Matrix) -> Reorder | None:
    """How the inputs of `matrix` may be reordered, if their order is this block's own affair.

    That holds for the channels between the projections of a feed-forward layer, and for those of a value
    head: whatever makes them and whatever reads them lies in the block, and nothing between mixes them. It
    does not hold for the residual stream, for what rotary positions pair, or for experts, of which each
    would want its own order.
    """
    segments = matrix.columns.segments
    if matrix.expert is not None or len(segments) != 1:
        return None
    (read,) = segments
    if read.space is not None and read.space.endswith("ffn") and read.unit == 1:
        return Reorder(read.space, 1, 1, read.count, inside=False)
    made = _values(block) if read.inner == VALUES else None
    if made is None or made.space is None:
        return None
    return Reorder(made.space, made.count, read.count // made.count, made.unit, inside=True)


def _values(block: Block) -> Segment | None:
    """The rows of the block that make the values of attention, where the family file names them."""
    rows = (segment for matrix in block.matrices for segment in matrix.rows.segments)
    return next((segment for segment in rows if segment.inner == VALUES), None)


def permute(block: Block, parameters: Mapping[str, Tensor], reorder: Reorder, orders: Tensor) -> None:
    """Reorder every axis of the block that the freedom concerns, in place.

    Args:
        parameters: in-memory tensors by their name inside the block.
        orders: (parts, width) int64; place i of a part takes what stood at `orders[part, i]`.
    """
    for name, axes in block.axes.items():
        for dimension, axis in enumerate(axes):
            positions = _positions(axis, reorder, orders.cpu())
            if positions is not None:
                tensor = parameters[name].detach()
                tensor.copy_(tensor.index_select(dimension, positions.to(tensor.device)))


def _positions(axis: Axis, reorder: Reorder, orders: Tensor) -> Tensor | None:
    """The new order of an axis, or None where it has no part in this."""
    if not any(_concerned(segment, reorder) for segment in axis.segments):
        return None
    parts, start = [], 0
    for segment in axis.segments:
        own = torch.arange(segment.size)
        if _concerned(segment, reorder):
            own = _units(segment, reorder, orders)
        parts.append(start + own)
        start += segment.size
    return torch.cat(parts)


def _concerned(segment: Segment, reorder: Reorder) -> bool:
    return segment.inner == VALUES if reorder.inside else segment.space == reorder.space


def _units(segment: Segment, reorder: Reorder, orders: Tensor) -> Tensor:
    if reorder.inside:
        return _shifted(orders, segment.count // reorder.parts)
    return (orders[0][:, None] * segment.unit + torch.arange(segment.unit)).flatten()


def _shifted(orders: Tensor, together: int) -> Tensor:
    """Orders of heads that lie one after the other, as one order."""
    heads = orders.repeat_interleave(together, 0)
    return (heads + torch.arange(len(heads), device=heads.device)[:, None] * heads.shape[1]).flatten()
