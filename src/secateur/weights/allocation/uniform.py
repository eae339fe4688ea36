"""The same sparsity everywhere."""

from __future__ import annotations

from typing import ClassVar

from secateur.weights.allocation.base import Allocation, Measured, register

__all__ = ["Uniform"]


@register
class Uniform(Allocation):
    """Every block loses the same fraction."""

    id: ClassVar[str] = "uniform"
    effect: ClassVar[str] = "the same sparsity in every block"
    fits_groups: ClassVar[bool] = True

    def sparsities(self, measured: list[Measured], sizes: list[int], sparsity: float) -> list[float]:
        return [sparsity] * len(sizes)
