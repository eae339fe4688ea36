"""One to eight bits a weight in groups along the input, as `secateur.quantise.low_bit` lays them out, and
several such matrices in place of one tensor (`secateur.quantise.low_bit_stack`).

Other than the formats of zeros it is not exact: `pack` rounds. What a method has rounded already is stored to
the bit by `packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.quantise import low_bit_stack
from secateur.quantise.gptq import Quantised, round_to_nearest
from secateur.quantise.grid import GROUP
from secateur.quantise.low_bit import PARTS, parts_of, weight_of, wrong_with
from secateur.storage.bits import as_matrix, rows_and_columns
from secateur.storage.formats import FORMATS, Format, Packed, refused

__all__ = ["LowBit", "LowBitStack", "packed", "packed_matrices", "packed_stack", "rows_together"]


@FORMATS.register("low-bit")
class LowBit(Format):
    """See the module."""

    id: ClassVar[str] = "low-bit"
    parts: ClassVar[tuple[str, ...]] = PARTS
    exact: ClassVar[bool] = False

    @classmethod
    def pack(
        cls, weight: Tensor, *, bits: int | None = None, group: int = GROUP, **_: Any
    ) -> dict[str, Tensor]:
        """
        Args:
            bits: 1 to 8.
            group: columns that share a grid.

        Raises:
            InputError: without `bits`: rounding is asked for by a method, not by a format.
        """
        if bits is None:
            raise _without_bits(cls.id)
        return parts_of(round_to_nearest(as_matrix(weight).float(), bits, group=group, steps=0))

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        _, columns = rows_and_columns(shape)
        return weight_of(parts, columns, dtype).view(shape)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if why := wrong_with(parts, *rows_and_columns(shape)):
            raise refused(name, why)


@FORMATS.register("low-bit-stack")
class LowBitStack(Format):
    """See the module."""

    id: ClassVar[str] = "low-bit-stack"
    parts: ClassVar[tuple[str, ...]] = low_bit_stack.PARTS
    exact: ClassVar[bool] = False

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        *,
        bits: int | None = None,
        group: int = GROUP,
        transposed: bool = False,
        **_: Any,
    ) -> dict[str, Tensor]:
        """
        Args:
            bits: 1 to 8.
            group: inputs that share a grid.
            transposed: the tensor is (..., inputs, outputs).

        Raises:
            InputError: without `bits`: rounding is asked for by a method, not by a format.
        """
        if bits is None:
            raise _without_bits(cls.id)
        turned = weight.mT if transposed else weight
        planes = turned.reshape(-1, *turned.shape[-2:]).float()
        rounded = [round_to_nearest(plane, bits, group=group, steps=0) for plane in planes]
        return low_bit_stack.join([parts_of(one) for one in rounded], transposed=transposed)

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return low_bit_stack.stack_of(parts, shape).to(dtype)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if why := low_bit_stack.wrong_with_stack(parts, shape):
            raise refused(name, why)


def packed(quantised: Quantised, dtype: torch.dtype) -> Packed:
    """A rounded matrix as it is stored, in place of a tensor of `dtype`."""
    parts = {name: part.cpu() for name, part in parts_of(quantised).items()}
    return Packed(LowBit.id, tuple(quantised.codes.shape), dtype, parts)


def packed_stack(matrices: Sequence[Packed], shape: tuple[int, ...], *, transposed: bool) -> Packed:
    """Packed matrices, (outputs, inputs) each, in place of the tensor of this shape that holds them all."""
    parts = low_bit_stack.join([one.parts for one in matrices], transposed=transposed)
    return Packed(LowBitStack.id, shape, matrices[0].dtype, parts)


def packed_matrices(stack: Packed) -> list[Packed]:
    """The inverse of `packed_stack`."""
    first, second = stack.shape[-2:]
    plane = (second, first) if bool(stack.parts["transposed"]) else (first, second)
    own = low_bit_stack.split(stack.parts, stack.shape)
    return [Packed(LowBit.id, plane, stack.dtype, parts) for parts in own]


def rows_together(matrices: Sequence[Packed]) -> Sequence[Packed]:
    """Packed matrices as one, of all their rows, where they have the same bits and groups."""
    layouts = [one.parts["layout"] for one in matrices if one.format == LowBit.id]
    if len(layouts) != len(matrices) or not all(layout.equal(layouts[0]) for layout in layouts):
        return matrices
    first, rows = matrices[0], sum(one.shape[0] for one in matrices)
    parts = {
        name: part if name == "layout" else torch.cat([one.parts[name] for one in matrices])
        for name, part in first.parts.items()
    }
    return [Packed(LowBit.id, (rows, first.shape[1]), first.dtype, parts)]


def _without_bits(format: str) -> InputError:
    return InputError(
        f"{format} without a number of bits", "a method that rounds", "use --method mc-moe or uniform-bits"
    )
