"""One to eight bits a weight in groups along the input, as `secateur.quantise.low_bit` lays them out.

Other than the formats of zeros it is not exact: `pack` rounds. What a method has rounded already is stored to
the bit by `packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.quantise.gptq import Quantised, round_to_nearest
from secateur.quantise.grid import GROUP
from secateur.quantise.low_bit import PARTS, parts_of, quantised_of, wrong_with
from secateur.storage.bits import as_matrix, rows_and_columns
from secateur.storage.formats import FORMATS, Format, Packed, refused

__all__ = ["LowBit", "packed"]


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
            raise InputError(
                "low-bit without a number of bits", "a method that rounds", "use --method mc-moe"
            )
        return parts_of(round_to_nearest(as_matrix(weight).float(), bits, group=group, steps=0))

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        _, columns = rows_and_columns(shape)
        return quantised_of(parts, columns).weight.to(dtype).view(shape)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if why := wrong_with(parts, *rows_and_columns(shape)):
            raise refused(name, why)


def packed(quantised: Quantised, dtype: torch.dtype) -> Packed:
    """A rounded matrix as it is stored, in place of a tensor of `dtype`."""
    parts = {name: part.cpu() for name, part in parts_of(quantised).items()}
    return Packed(LowBit.id, tuple(quantised.codes.shape), dtype, parts)
