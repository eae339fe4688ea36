"""Experts at random: what every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.experts.base import ExpertMethod, ExpertProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RandomExperts"]


@register
class RandomExperts(ExpertMethod):
    """A uniform number for every expert, the same for the same seed."""

    id: ClassVar[str] = "random-experts"
    comparable: ClassVar[bool] = True

    def score(self, problem: ExpertProblem) -> Tensor:
        import torch

        return torch.rand(problem.count, generator=problem.generator)
