"""AlphaPruning: blocks whose spectra have heavy tails, the well-trained ones, keep more."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.weights.allocation.base import (
    Allocation,
    Measured,
    NamedMatrix,
    register,
    rescaled,
)

__all__ = ["AlphaPruning"]


@register
class AlphaPruning(Allocation):
    """Tail exponent of the spectra of a block, mapped to [1 - eps, 1 + eps] times the sparsity
    (one-shot-baselines, section 2.11). Needs no data.
    """

    id: ClassVar[str] = "alpha"
    paper: ClassVar[Paper | None] = Paper(
        "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning "
        "of Large Language Models",
        2024,
        "2410.10912",
    )
    needs_pass: ClassVar[Literal["none", "weights", "activations"]] = "weights"

    eps: float = Field(0.3, ge=0, lt=1, description="half the range of the ratios")

    def measure(self, block_index: int, matrices: list[NamedMatrix]) -> Measured:
        """`alpha`: mean tail exponent of the block's matrices."""
        from secateur.weights.allocation.spectrum import tail_exponent

        exponents = [tail_exponent(weight) for _, weight, _ in matrices]
        return {"alpha": sum(exponents) / len(exponents)}

    def sparsities(self, measured: list[Measured], sizes: list[int], sparsity: float) -> list[float]:
        exponents = [block["alpha"] for block in measured]
        lowest, spread = min(exponents), max(exponents) - min(exponents)
        if spread == 0 or self.eps == 0:
            return [sparsity] * len(sizes)
        ratios = [1 - self.eps + 2 * self.eps * (value - lowest) / spread for value in exponents]
        return rescaled(ratios, sizes, sparsity)
