"""Reorder the channels of a space inside one block without changing what the block computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.anatomy.cut import entries
from secateur.anatomy.model import Block, Matrix

__all__ = ["permutable_space", "permute"]


def permutable_space(matrix: Matrix) -> str | None:
    """The space of the inputs of `matrix`, if their order is this block's own affair.

    That holds for the channels between the projections of a feed-forward layer: whatever makes them and
    whatever reads them lies in the block, and the activation treats each alone. It does not hold for the
    residual stream, for channels inside a head, or for experts, of which each would want its own order.
    """
    segments = matrix.columns.segments
    if matrix.expert is not None or len(segments) != 1 or segments[0].unit != 1:
        return None
    space = segments[0].space
    return space if space is not None and space.endswith("ffn") else None


def permute(block: Block, parameters: Mapping[str, Tensor], space: str, order: Tensor) -> None:
    """Reorder every axis of the block that lies in `space`, in place.

    Args:
        parameters: in-memory tensors by their name inside the block.
        order: (count,) int64; position i takes what stood at `order[i]`.
    """
    for name, axes in block.axes.items():
        for dimension, axis in enumerate(axes):
            positions = entries(axis, {space: order.cpu()})
            if positions is not None:
                tensor = parameters[name].detach()
                tensor.copy_(tensor.index_select(dimension, positions.to(tensor.device)))
