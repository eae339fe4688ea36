"""Heads and channels by the weights that read them alone: a crash test rather than a method to ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.structure.base import StructureMethod, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MagnitudeStructure"]


@register
class MagnitudeStructure(StructureMethod):
    """Sum over a unit's columns of their l2 norm in the collecting matrix (structured-baselines, 2.1)."""

    id: ClassVar[str] = "magnitude-structure"

    def score(self, problem: UnitProblem) -> Tensor:
        return problem.units.per_unit(problem.weight.norm(dim=0)).sum(1)
