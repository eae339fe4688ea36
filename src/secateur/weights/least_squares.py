"""Least squares in the metric of the calibration inputs: the scaled Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from secateur.core.errors import NumericsError
from secateur.core.statistics import InputStatistics

__all__ = ["ScaledGram", "scaled_gram"]


@dataclass(frozen=True)
class ScaledGram:
    """Damped X^T X scaled to a unit diagonal, and its eigendecomposition.

    Attributes:
        matrix: (in, in) float32.
        scale: (in,) float32 square roots of the diagonal before scaling.
        vectors: (in, in) float32 eigenvectors.
        values: (in,) float64 eigenvalues.
    """

    matrix: Tensor
    scale: Tensor
    vectors: Tensor
    values: Tensor

    def inverse(self, rho: float) -> Tensor:
        """(in, in) of (matrix + rho I)^-1."""
        return (self.vectors * (self.values + rho).reciprocal().float()) @ self.vectors.T


def scaled_gram(inputs: InputStatistics, damping: float) -> ScaledGram:
    """Damp, scale and decompose the Hessian, in float64; kept in the cache of `inputs`.

    Args:
        inputs: with their Hessian.
        damping: fraction of the mean diagonal added to it.

    Raises:
        NumericsError: the Hessian is not finite.
    """
    key = ("scaled_gram", damping)
    if key not in inputs.cache:
        if inputs.hessian is None:
            raise ValueError("the Hessian was not observed")
        damped = inputs.hessian.double()
        mean = damped.diagonal().mean()
        if not bool(torch.isfinite(mean)):
            raise NumericsError("the Hessian has entries that are not finite")
        damped.diagonal().add_(damping * mean)
        scale = damped.diagonal().sqrt() + 1e-8
        damped.div_(scale).div_(scale[:, None])
        values, vectors = torch.linalg.eigh(damped)
        inputs.cache[key] = ScaledGram(damped.float(), scale.float(), vectors.float(), values)
    return cast(ScaledGram, inputs.cache[key])
