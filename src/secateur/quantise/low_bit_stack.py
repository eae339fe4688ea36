"""How several matrices of a few bits are stored where the dense ones are one tensor: the parts of all, one
after the other.

The tensor is (..., outputs, inputs), or (..., inputs, outputs) where it is transposed; its n matrices are
those of its last two axes, and each has bits of its own. Parts (see `low_bit`):

    layout      int32 (n, 2)     bits of a code, and the columns of a group
    transposed  int32 (1,)       whether the dense tensor holds inputs before outputs
    codes       uint8 (bytes,)   those of all matrices
    scale       float16 (...,)   the same
    low         float16 (...,)   the same; matrices of one bit have none
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from secateur.quantise.codes import row_bytes
from secateur.quantise.grid import METADATA
from secateur.quantise.low_bit import MOST_BITS, weight_of, wrong_with

__all__ = ["PARTS", "join", "split", "stack_of", "wrong_with_stack"]

PARTS = ("layout", "transposed", "codes", "scale", "low")
Lengths = dict[str, int]


def join(matrices: Sequence[Mapping[str, Tensor]], *, transposed: bool) -> dict[str, Tensor]:
    """The parts of all matrices, each in `low_bit.parts_of`, as those of one tensor."""
    flat = {name: [one[name].flatten() for one in matrices if name in one] for name in PARTS[2:]}
    return {
        "layout": torch.stack([one["layout"] for one in matrices]),
        "transposed": torch.tensor([int(transposed)], dtype=torch.int32),
        **{name: torch.cat(own or [torch.empty(0, dtype=METADATA)]) for name, own in flat.items()},
    }


def split(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """The inverse of `join`: views, for each matrix of a tensor of this shape."""
    rows, columns = _plane(parts, shape)
    at = dict.fromkeys(PARTS[2:], 0)
    for layout in parts["layout"]:
        found = {"layout": layout}
        for name, length in _lengths(layout, rows, columns).items():
            if length:
                found[name] = parts[name][at[name] : at[name] + length].view(rows, -1)
            at[name] += length
        yield found


def stack_of(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The dense tensor of this shape, float32."""
    _, columns = _plane(parts, shape)
    planes = torch.stack([weight_of(one, columns) for one in split(parts, shape)])
    return (planes.mT.contiguous() if bool(parts["transposed"]) else planes).view(*shape)


def wrong_with_stack(parts: Mapping[str, Tensor], shape: Sequence[int]) -> str:
    """Why these cannot be the parts of a tensor of this shape; empty where they can."""
    layout, count = parts["layout"], prod(shape[:-2])
    if len(shape) < 2 or layout.shape != (count, 2) or layout.dtype != torch.int32:
        return f"its layout is {layout.dtype} of {tuple(layout.shape)}, not int32 of {(count, 2)}"
    if parts["transposed"].shape != (1,) or parts["transposed"].item() not in (0, 1):
        return "it does not say whether it is transposed"
    bits, group = layout.unbind(1)
    if not bool(((bits >= 1) & (bits <= MOST_BITS) & (group >= 1)).all()):
        return f"it has matrices of {bits.tolist()} bits in groups of {group.tolist()}"
    rows, columns = _plane(parts, shape)
    lengths = [_lengths(one, rows, columns) for one in layout]
    for name in PARTS[2:]:
        expected = (sum(one[name] for one in lengths),)
        if parts[name].shape != expected:
            return f"its {name} is of {tuple(parts[name].shape)}, not {expected}"
    return next(filter(None, (wrong_with(one, rows, columns) for one in split(parts, shape))), "")


def _plane(parts: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of each matrix."""
    first, second = shape[-2:]
    return (second, first) if bool(parts["transposed"]) else (first, second)


def _lengths(layout: Tensor, rows: int, columns: int) -> Lengths:
    """Elements of the parts of one matrix."""
    bits, group = layout.tolist()
    groups = rows * -(-columns // group)
    return {"codes": rows * row_bytes(columns, bits), "scale": groups, "low": groups if bits > 1 else 0}
