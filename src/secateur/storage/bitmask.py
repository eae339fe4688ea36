"""One bit an element and the elements whose bit is set: any pattern of zeros.

Parts of a tensor with R rows (all axes but the last) of C columns, z of whose elements are stored:

    mask    uint8 (R, ceil(C / 8))  (i, j) is stored when bit j % 8, the least first, of byte (i, j // 8) is
                                    set; bits beyond column C are 0
    values  dtype (z,)              the stored elements, row after row

Bits: 1 + (1 - sparsity) * 16 an element in bfloat16. What is not stored is +0.0: an element with any bit set,
such as -0.0, is stored, so the result equals the input bit for bit. Where a row begins in `values` follows
from the mask (`row_offsets`) and is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.pattern import Pattern
from secateur.storage.bits import (
    as_matrix,
    gather,
    not_zero,
    pack_bits,
    rows_and_columns,
    spread,
    unpack_bits,
)
from secateur.storage.formats import FORMATS, Format, refused

__all__ = ["Bitmask", "row_offsets"]


@FORMATS.register("bitmask")
class Bitmask(Format):
    """See the module."""

    id: ClassVar[str] = "bitmask"
    parts: ClassVar[tuple[str, ...]] = ("mask", "values")
    typed: ClassVar[tuple[str, ...]] = ("values",)

    @classmethod
    def pack(cls, weight: Tensor, *, mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        """
        Args:
            mask: bool of the shape of `weight`: what is stored, zeros among it included; by default every
                element that is not +0.0.

        Raises:
            InputError: a mask that leaves out an element that is not +0.0.
        """
        matrix = as_matrix(weight)
        needed = not_zero(matrix)
        stored = needed if mask is None else mask.cpu().reshape(matrix.shape)
        if mask is not None and bool((needed & ~stored).any()):
            raise InputError("a mask that leaves out weights that are not zero", "one that covers them")
        return {"mask": pack_bits(stored), "values": gather(matrix, stored)}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = parts["values"].to(dtype)
        _, columns = rows_and_columns(shape)
        return spread(values, unpack_bits(parts["mask"], columns)).view(shape)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        mask, values = parts["mask"], parts["values"]
        rows, columns = rows_and_columns(shape)
        width = -(-columns // 8)
        if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, width):
            raise refused(
                name, f"its mask is {mask.dtype} of {tuple(mask.shape)}, not uint8 of {(rows, width)}"
            )
        if columns % 8 and bool((mask[:, -1] >> (columns % 8)).any()):
            raise refused(name, f"its mask has bits beyond column {columns}")
        count = int(row_offsets(mask)[-1])
        if values.ndim != 1 or len(values) != count:
            raise refused(name, f"its mask counts {count} values and {tuple(values.shape)} are there")

    @classmethod
    def expected_bytes(cls, shape: tuple[int, ...], itemsize: int, sparsity: float, pattern: Pattern) -> int:
        rows, columns = rows_and_columns(shape)
        return rows * -(-columns // 8) + round((1 - sparsity) * rows * columns) * itemsize


def row_offsets(mask: Tensor) -> Tensor:
    """Where each row of a mask begins in `values`, and the end: (rows + 1,) int64."""
    pairs = mask - ((mask >> 1) & 0x55)  # of set bits, in every two bits of a byte; then in four and eight
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = (fours + (fours >> 4)) & 0x0F
    return torch.nn.functional.pad(counts.sum(-1, dtype=torch.int64).cumsum(0), (1, 0))
