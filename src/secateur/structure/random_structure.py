"""Heads and channels at random: what every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.structure.base import StructureMethod, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RandomStructure"]


@register
class RandomStructure(StructureMethod):
    """A uniform number for every unit, the same for the same seed."""

    id: ClassVar[str] = "random-structure"

    def score(self, problem: UnitProblem) -> Tensor:
        import torch

        return torch.rand(problem.units.count, generator=problem.generator)
