"""Least squares where only some of the values may differ from zero."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve_on_support"]


def solve_on_support(
    gram: Tensor, target: Tensor, values: Tensor, kept: Tensor, most: int, tolerance: float = 1e-4
) -> tuple[Tensor, int]:
    """Conjugate gradients for every output row at once, restricted to its support.

    The unit diagonal makes the plain method the Jacobi-preconditioned one. A row stands still once its
    residual has fallen below `tolerance` of the first.

    Args:
        gram: (in, in) with a unit diagonal.
        target: (out, in) dense values to approximate.
        values: (out, in) to start from, zero outside the support.
        kept: (out, in) bool, the support.
        most: steps at most.
        tolerance: relative residual that is good enough.

    Returns:
        Values (out, in), and the number of steps taken.
    """
    residual = ((target - values) @ gram) * kept
    direction, energy = residual.clone(), residual.square().sum(-1, keepdim=True)
    enough = energy * tolerance**2
    for step in range(most):
        if bool((energy <= enough).all()):
            return values, step
        image = (direction @ gram) * kept
        curvature = (direction * image).sum(-1, keepdim=True)
        length = torch.where(energy > enough, energy / curvature, 0.0)
        values = values + length * direction
        residual = residual - length * image
        before, energy = energy, residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(before > 0, energy / before, 0.0) * direction
    return values, most
