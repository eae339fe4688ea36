"""At most N of every M consecutive elements of a row, with their places: 2:4 and other N:M patterns.

Parts of a tensor with R rows (all axes but the last) of G groups of M = C / G columns:

    values   dtype (R, G, N)  N elements of each group by ascending place; a group with fewer has zeros
    indices  uint8 (ceil(R * G * N * b / 8),)
             the place of each in its group in b = ceil(log2(M)) bits, in the order of `values`, least bits
             first; the rest of the last byte is 0

Bits an element: (N / M) * (bits of dtype + b); 2:4 in bfloat16 takes 9 of 16. For 4:8 and others with long
places `bitmask` takes less. What is not stored is +0.0; the result equals the input bit for bit.

`nm-columns` is the same of a tensor whose last two axes are swapped: groups of inputs lie in the columns of
matrices that are stored as (inputs, outputs). `--format nm` takes whichever finds them.
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
from secateur.storage.formats import FORMATS, Format, Packed, refused

__all__ = ["GroupsInColumns", "GroupsOfM"]

SIZES = (2, 4, 8, 16, 32)
"""Sizes of groups that are tried where none is given."""
MOST = 255
"""The largest group: a place is a byte while it is computed with."""


@FORMATS.register("nm")
class GroupsOfM(Format):
    """See the module."""

    id: ClassVar[str] = "nm"
    parts: ClassVar[tuple[str, ...]] = ("values", "indices")
    typed: ClassVar[tuple[str, ...]] = ("values",)
    others: ClassVar[tuple[str, ...]] = ("nm-columns",)

    @classmethod
    def pack(
        cls, weight: Tensor, *, of: int | None = None, keep: int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """
        Args:
            of: M; by default the size of groups that takes the fewest bytes.
            keep: N; by default the most that any group has.

        Raises:
            InputError: rows that M does not divide, or a group with more than N weights that are not +0.0.
        """
        matrix = as_matrix(weight)
        columns = matrix.shape[1]
        used = not_zero(matrix)
        size = of or _best_size(used, 8 * matrix.itemsize)
        if columns % size or size > MOST:
            raise InputError(
                f"{columns} columns in groups of {size}",
                f"groups of at most {MOST} that divide them",
                "use format bitmask",
            )
        most = _most(used, size)
        if keep is not None and most > keep:
            raise InputError(f"a group of {size} with {most} weights that are not zero", f"at most {keep}")
        kept = max(most if keep is None else keep, 1)
        groups = used.view(len(matrix), columns // size, size)
        missing = kept - _counts(used, size)[..., None]
        chosen = groups | ((~groups).cumsum(-1, dtype=torch.uint8) <= missing) if missing.any() else groups
        places = gather(torch.arange(size, dtype=torch.uint8).expand(groups.shape), chosen)
        values = gather(matrix, chosen).view(*groups.shape[:-1], kept)
        return {"values": values, "indices": _pack_places(places, _width(size))}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = parts["values"].to(dtype)
        rows, groups, _ = values.shape
        size = rows_and_columns(shape)[1] // max(groups, 1)
        places = _unpack_places(parts["indices"], values.numel(), _width(size)).view(values.shape)
        mask = torch.zeros((rows, groups, size), dtype=torch.bool, device=values.device)
        for nth in places.unbind(-1):
            mask |= nth[..., None] == torch.arange(size, dtype=torch.uint8, device=values.device)
        return spread(values.view(-1), mask).view(shape)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        values, indices = parts["values"], parts["indices"]
        rows, columns = rows_and_columns(shape)
        groups = values.shape[1] if values.ndim == 3 else 0
        if values.ndim != 3 or len(values) != rows or not groups or columns % groups:
            raise refused(name, f"its values of {tuple(values.shape)} do not divide {rows} rows of {columns}")
        size, kept = columns // groups, values.shape[2]
        if size > MOST:
            raise refused(name, f"it has groups of {size}, and {MOST} is the most")
        width = -(-values.numel() * _width(size) // 8)
        if kept > size or indices.dtype != torch.uint8 or tuple(indices.shape) != (width,):
            raise refused(name, f"its indices of {tuple(indices.shape)} are not those of {kept}:{size}")
        places = _unpack_places(indices, values.numel(), _width(size)).view(values.shape)
        if bool((places >= size).any()) or bool((places[..., 1:] <= places[..., :-1]).any()):
            raise refused(name, f"its indices do not ascend within groups of {size}")

    @classmethod
    def expected_bytes(
        cls, shape: tuple[int, ...], itemsize: int, sparsity: float, pattern: Pattern
    ) -> int | None:
        if pattern.kind != "n:m":
            return None
        rows, columns = rows_and_columns(shape)
        kept = rows * columns * pattern.keep // pattern.of
        return kept * itemsize - (-kept * _width(pattern.of) // 8)


@FORMATS.register("nm-columns")
class GroupsInColumns(Format):
    """Groups of M consecutive elements of a column: the parts are those of the transposed tensor in `nm`."""

    id: ClassVar[str] = "nm-columns"
    parts: ClassVar[tuple[str, ...]] = GroupsOfM.parts
    variant: ClassVar[bool] = True

    @classmethod
    def pack(cls, weight: Tensor, **meta: Any) -> dict[str, Tensor]:
        """As `GroupsOfM.pack`. Raises `InputError` also for a tensor without columns."""
        if weight.ndim < 2:
            raise InputError(f"a tensor of {weight.ndim} axes", "at least two", "keep it as it is")
        return GroupsOfM.pack(weight.mT, **meta)

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return GroupsOfM.unpack(parts, _swapped(shape), dtype).mT.contiguous()

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise refused(name, f"groups in columns need two axes, and it is of {shape}")
        GroupsOfM.check(parts, name, _swapped(shape))

    @classmethod
    def swapped(cls, packed: Packed) -> Packed:
        """The tensor with its last two axes swapped, which has the same parts in `nm`."""
        return Packed(GroupsOfM.id, _swapped(packed.shape), packed.dtype, packed.parts)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _width(size: int) -> int:
    """Bits of a place in a group."""
    return max((int(size) - 1).bit_length(), 1)  # while torch traces, sizes are tensors


def _counts(used: Tensor, size: int) -> Tensor:
    """How many are set in each group: (rows, groups) uint8."""
    counts = used.view(torch.uint8)
    while size % 2 == 0:  # halves are added up: quick where sums over a short axis are not
        counts, size = counts[:, 0::2] + counts[:, 1::2], size // 2
    return counts.reshape(len(used), counts.shape[1] // size, size).sum(-1, dtype=torch.uint8)


def _most(used: Tensor, size: int) -> int:
    counts = _counts(used, size)
    return int(counts.max()) if counts.numel() else 0


def _best_size(used: Tensor, bits: int) -> int:
    """The size of groups that takes the fewest bits an element, the smallest of equals."""
    fitting = [size for size in SIZES if used.shape[1] % size == 0]
    if not fitting:
        raise InputError(f"{used.shape[1]} columns", "an even number", "use format bitmask")
    return min(fitting, key=lambda size: max(_most(used, size), 1) * (bits + _width(size)) / size)


def _pack_places(places: Tensor, width: int) -> Tensor:
    bits = torch.stack([(places >> bit) & 1 for bit in range(width)], dim=-1)
    return pack_bits(bits.bool().view(1, -1)).view(-1)


def _unpack_places(packed: Tensor, count: int, width: int) -> Tensor:
    bits = unpack_bits(packed.view(1, -1), count * width).view(count, width).view(torch.uint8)
    places = torch.zeros(count, dtype=torch.uint8, device=packed.device)
    for bit in range(width):
        places |= bits[:, bit] << bit
    return places
