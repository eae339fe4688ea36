"""Cutting a block along its spaces: every tensor with an axis in a space loses the same entries.

What belongs together follows from the axes alone (structured-baselines, section 2.0): a channel of a gated
feed-forward part is a row of gate and up and a column of down because all three have an axis in `ffn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from secateur.anatomy.model import Anatomy, Axis, Block, Segment, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Kept",
    "cut_block",
    "cut_outer",
    "cut_shapes",
    "entries",
    "expand_block",
    "pad_block",
    "residual_spaces",
    "space_parameters",
]

Kept = Mapping[str, "Tensor"]
"""By space, int64 numbers of what stays, in the order it shall have; spaces not named stay whole."""


def entries(axis: Axis, kept: Kept) -> Tensor | None:
    """The positions along an axis that stay, or None for an axis in none of these spaces."""
    import torch

    if not any(segment.space in kept for segment in axis.segments):
        return None
    parts, start = [], 0
    for segment in axis.segments:
        parts.append(start + _entries(segment, kept))
        start += segment.size
    return torch.cat(parts)


def _entries(segment: Segment, kept: Kept) -> Tensor:
    import torch

    if segment.space is None or segment.space not in kept:
        return torch.arange(segment.size)
    return (kept[segment.space][:, None] * segment.unit + torch.arange(segment.unit)).flatten()


def cut_block(block: Block, parameters: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The block's in-memory tensors without the units that go; tensors that lose nothing are passed on as
    they are.

    Args:
        parameters: by name inside the block.
        kept: what stays.
    """
    return {name: _cut(tensor, block.axes[name], kept) for name, tensor in parameters.items()}


def cut_outer(anatomy: Anatomy, tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The same for tensors outside the blocks, by full name; tied ones are cut alike.

    Raises:
        KeyError: a parameter whose axes are not known.
    """
    axes = anatomy.outer_axes
    return {name: _cut(tensor, axes[anatomy.tied.get(name, name)], kept) for name, tensor in tensors.items()}


def residual_spaces(anatomy: Anatomy) -> tuple[str, ...]:
    """The spaces that are the residual stream: `hidden`, and that of embeddings which are not projected."""
    names = ("hidden", "embedding")
    return tuple(name for name in names if anatomy.spaces.get(name) == anatomy.spaces["hidden"])


def _cut(tensor: Tensor, axes: Sequence[Axis], kept: Kept) -> Tensor:
    for dimension, axis in enumerate(axes):
        positions = entries(axis, kept)
        if positions is not None:
            tensor = tensor.index_select(dimension, positions.to(tensor.device))
    return tensor


def expand_block(block: Block, smaller: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The opposite of `cut_block`: zeros where units are gone, and no tensors but those of the block."""
    whole: dict[str, Tensor] = {}
    for name, axes in block.axes.items():
        tensor = smaller[name]
        for dimension, axis in enumerate(axes):
            positions = entries(axis, kept)
            if positions is not None:
                shape = [*tensor.shape[:dimension], axis.size, *tensor.shape[dimension + 1 :]]
                tensor = tensor.new_zeros(shape).index_copy(dimension, positions, tensor)
        whole[name] = tensor
    return whole


def cut_shapes(block: Block, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes of the block's tensors when these spaces have these many units."""

    def size(segment: Segment) -> int:
        return sizes.get(segment.space or "", segment.count) * segment.unit

    return {name: tuple(sum(map(size, axis.segments)) for axis in axes) for name, axes in block.axes.items()}


def space_parameters(
    block: Block, entries: Mapping[str, int], weights: Mapping[str, int] | None = None
) -> int:
    """Parameters that go when each of these spaces loses so many entries.

    Args:
        weights: what one element of each tensor counts, such as its bytes; by default 1.
    """
    segments = (segment for axes in block.axes.values() for axis in axes for segment in axis.segments)
    whole = {segment.space: segment.count for segment in segments}
    less = {space: whole[space] - gone for space, gone in entries.items() if space in whole}
    smaller = cut_shapes(block, less)
    return sum(
        (prod(shape) - prod(smaller[name])) * (weights[name] if weights else 1)
        for name, shape in block.parameters.items()
    )


def pad_block(
    block: Block, smaller: Mapping[str, Tensor], target: Block, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of `target` with those of a block of no larger sizes inside, and zeros elsewhere.

    Units keep their order and come first in each segment, so that a zero head or channel reads zero weights
    and is read by zero weights. What the smaller block lacks altogether (a bias, a part) is zero.

    Args:
        smaller: tensors by name inside `block`.
        dtype: of tensors that the smaller block lacks.

    Raises:
        ValueError: a tensor that `target` does not have, or a segment larger than its own.
    """
    import torch

    if extra := smaller.keys() - target.axes.keys():
        raise ValueError(f"the uniform block has no {sorted(extra)[0]}")
    whole: dict[str, Tensor] = {}
    for name, axes in target.axes.items():
        tensor = smaller[name] if name in smaller else torch.zeros(target.parameters[name], dtype=dtype)
        if name in smaller:
            for dimension, (axis, wide) in enumerate(zip(block.axes[name], axes, strict=True)):
                tensor = _padded(tensor, dimension, axis, wide)
        whole[name] = tensor
    return whole


def _padded(tensor: Tensor, dimension: int, axis: Axis, wide: Axis) -> Tensor:
    import torch

    if axis.size == wide.size:
        return tensor
    positions, start = [], 0
    for segment, room in zip(axis.segments, wide.segments, strict=True):
        if segment.size > room.size:
            raise ValueError(f"{segment.size} entries of {segment.space} in room for {room.size}")
        positions.append(start + torch.arange(segment.size))
        start += room.size
    shape = [*tensor.shape[:dimension], wide.size, *tensor.shape[dimension + 1 :]]
    return tensor.new_zeros(shape).index_copy(dimension, torch.cat(positions), tensor)
