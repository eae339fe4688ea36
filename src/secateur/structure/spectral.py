"""How far cutting rows moves the singular values of a matrix (prunenet, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ks_distance", "singular_values", "wasserstein"]


def singular_values(matrices: Tensor) -> Tensor:
    """(..., min(n, d)) ascending float64, of (..., n, d), by the Gram matrix of the smaller side.

    Squares lose half of the digits, which float64 has to spare.
    """
    import torch

    matrices = matrices.double()
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return values


def ks_distance(a: Tensor, b: Tensor) -> Tensor:
    """(...) two-sample Kolmogorov-Smirnov statistics of ascending samples (..., n) and (..., m)."""
    return _difference(a, b)[1].amax(-1)


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """(...) Wasserstein-1 distances of ascending samples (..., n) and (..., m), in their unit."""
    points, difference = _difference(a, b)
    return (difference[..., :-1] * points.diff(dim=-1)).sum(-1)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """All points of both samples, ascending, and |ECDF_a - ECDF_b| at each."""
    import torch

    points = torch.cat([a, b], -1).sort(-1).values
    below = [
        torch.searchsorted(sample.contiguous(), points, right=True).double() / sample.shape[-1]
        for sample in (a, b)
    ]
    return points, (below[0] - below[1]).abs()
