"""Weights dropped at random: the floor every other method must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.weights.base import Problem, WeightMethod, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random"]


@register
class Random(WeightMethod):
    """Scores drawn from the uniform distribution with the generator of the matrix."""

    id: ClassVar[str] = "random"

    def score(self, problem: Problem) -> Tensor:
        import torch

        shape, device = problem.weight.shape, problem.weight.device
        # drawn on the generator's device, so that a seed means the same masks on any machine
        source = problem.generator.device if problem.generator is not None else device
        return torch.rand(shape, generator=problem.generator, device=source).to(device)
