"""The same bits for every expert: what mixed precision has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from secateur.experts.base import register
from secateur.experts.precision import PrecisionMethod, Rounding

__all__ = ["UniformBits"]


@register
class UniformBits(PrecisionMethod):
    """Every expert in as many bits; in a model without experts, every matrix of the blocks."""

    id: ClassVar[str] = "uniform-bits"

    bits: int = Field(3, ge=1, le=8, description="of a weight of an expert, without scales")

    @property
    def average_bits(self) -> float:
        return self.bits

    @property
    def other_bits(self) -> int:
        return self.bits

    def allot(self, blocks: Sequence[Rounding]) -> list[list[int]]:
        return [[self.bits] * block.count for block in blocks]
