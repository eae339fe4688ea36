"""NoWag: a matrix with unit columns and rows, and what its entries weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.statistics import InputStatistics

__all__ = ["Normalised", "normalise"]

EPSILON = 1e-5
"""Added to every norm, as published."""


@dataclass(frozen=True)
class Normalised:
    """W = diag(rows) matrix diag(columns), and the weights of the squared errors of its columns.

    Attributes:
        matrix: (out, in) float32.
        rows: (out,) float32.
        columns: (in,) float32.
        energy: (in,) float32, positive, of mean one: second moments of the input up to a factor.
    """

    matrix: Tensor
    rows: Tensor
    columns: Tensor
    energy: Tensor

    def importance(self) -> Tensor:
        """(out, in) what the weighted square of the matrix loses with each entry."""
        return self.matrix.square() * self.energy

    def restored(self, matrix: Tensor) -> Tensor:
        """A matrix in place of the normalised one, in the scale of the weights."""
        return self.rows[:, None] * matrix * self.columns


def normalise(weight: Tensor, inputs: InputStatistics) -> Normalised:
    """Columns first, then rows, by their Euclidean norms (armor, sections 2.1 and 2.2).

    Args:
        weight: (out, in) float32.
        inputs: with the second moment. Inputs without a finite positive one get the mean of the others.
    """
    columns = weight.norm(dim=0) + EPSILON
    scaled = weight / columns
    rows = scaled.norm(dim=1) + EPSILON
    return Normalised(scaled / rows[:, None], rows, columns, _energy(inputs))


def _energy(inputs: InputStatistics) -> Tensor:
    if inputs.second_moment is None:
        raise ValueError("the second moment was not observed")
    moments = inputs.second_moment.double()
    usable = moments.isfinite() & (moments > 0)
    if not bool(usable.any()):
        return torch.ones_like(moments, dtype=torch.float32)
    mean = moments[usable].mean()
    return torch.where(usable, moments / mean, 1.0).clamp_min(torch.finfo(torch.float32).tiny).float()
