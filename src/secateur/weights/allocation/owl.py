"""OWL: blocks with many outliers keep more."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import InputStatistics, Statistic
from secateur.weights.allocation.base import (
    Allocation,
    Measured,
    NamedMatrix,
    register,
    shifted,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Owl"]


@register
class Owl(Allocation):
    """Share of Wanda scores above M times the mean of the block, mapped to 2 * lamb of sparsity
    (one-shot-baselines, section 2.10).

    As published the blocks count alike, which misses the sparsity when they differ in size; here the mean
    over parameters is exact unless `weighted` is off.
    """

    id: ClassVar[str] = "owl"
    paper: ClassVar[Paper | None] = Paper(
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        2023,
        "2310.05175",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    needs_pass: ClassVar[Literal["none", "weights", "activations"]] = "activations"

    M: float = Field(5.0, gt=0, description="how many times the mean an outlier is")
    lamb: float = Field(0.08, ge=0, lt=0.5, description="half the range of the sparsities")
    weighted: bool = Field(True, description="mean over parameters, not over blocks")

    def measure(self, block_index: int, matrices: list[NamedMatrix]) -> Measured:
        """`outliers`: percent of the block's scores above M times their mean."""
        import torch

        scores = [_scores(weight, inputs) for _, weight, inputs in matrices]
        count = sum(score.numel() for score in scores)
        bar = self.M * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
        return {"outliers": 100 * sum(int((score > bar).sum()) for score in scores) / count}

    def sparsities(self, measured: list[Measured], sizes: list[int], sparsity: float) -> list[float]:
        outliers = [block["outliers"] for block in measured]
        lowest, spread = min(outliers), max(outliers) - min(outliers)
        if spread == 0 or self.lamb == 0:
            return [sparsity] * len(sizes)
        shares = [(value - lowest) / spread * 2 * self.lamb for value in outliers]
        return shifted([-share for share in shares], sizes if self.weighted else [1] * len(sizes), sparsity)


def _scores(weight: Tensor, inputs: InputStatistics | None) -> Tensor:
    if inputs is None or inputs.second_moment is None:
        raise ValueError("the second moment was not observed")
    return weight.abs() * inputs.input_norms()
