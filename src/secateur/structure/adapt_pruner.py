"""Adapt-Pruner: many small steps, each taking more from the blocks that do least."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.structure.base import AdaptiveMethod, register
from secateur.structure.taylor import TaylorScore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaptPruner", "importance"]

EQUAL = 1e-9
"""Blocks whose cosines differ by less are equally important."""

Normalise = Literal["maxabs", "std", "rank"]


@register
class AdaptPruner(TaylorScore, AdaptiveMethod):
    """Every step removes `step - amplitude * importance` of a block, importance in [-1, 1] from how much the
    block changes its input; inside a block the units that the loss feels least go (adapt-pruner, 2.1 to 2.3).
    """

    id: ClassVar[str] = "adapt-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training",
        2025,
        "2502.03460",
    )

    amplitude: float = Field(0.02, ge=0, description="how far the steps of two blocks may differ")
    normalise: Normalise = Field(
        "maxabs", description="importance over its largest magnitude, its standard deviation, or by rank"
    )

    def increments(self, moves: Tensor) -> Tensor:
        return self.step - self.amplitude * importance(moves, self.normalise)


def importance(moves: Tensor, normalise: Normalise) -> Tensor:
    """(blocks,) with mean 0 from `moves`, mean over tokens of 1 - cos(input, output): zeros where all are
    equal."""
    import torch

    centred = moves - moves.mean()
    if float(centred.abs().max()) < EQUAL:
        return torch.zeros_like(centred)
    if normalise == "maxabs":
        return centred / centred.abs().max()
    if normalise == "std":
        return centred / centred.std(correction=0)
    below = (moves[:, None] > moves).sum(1) - (moves[:, None] < moves).sum(1)
    return below.to(centred.dtype) / (len(moves) - 1)
