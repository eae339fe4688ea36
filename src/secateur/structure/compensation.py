"""What makes up for removed units: their mean as a bias, or least squares on the columns that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DAMPING", "mean_bias", "refit"]

DAMPING = 1e-4


def mean_bias(weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """(d,) what the removed columns write on average: W_D mu_D (flap, section 2.4).

    Args:
        weight: (d, C) float32.
        mean: (C,) mean input.
        removed: columns D, int64.
    """
    return weight[:, removed] @ mean[removed].float()


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """The weights on the columns that stay which come closest to the output of all (structured-baselines,
    section 2.5): W' = (H W^T)_k solved with H_kk.

    Args:
        weight: (d, C) float32.
        hessian: (C, C) sum of x x^T.
        kept: columns that stay, int64.

    Returns:
        (d, C) float32 with zeros in the other columns, and the damping that was needed.

    Raises:
        NumericsError: the Hessian is not finite, or singular whatever the damping.
    """
    import torch

    from secateur.core.numerics import damped_cholesky, exact_products

    with exact_products():
        inner = hessian[kept][:, kept].double()
        factor, used = damped_cholesky(inner, DAMPING)
        damped = used * inner.diagonal().mean()
        target = hessian[kept].double() @ weight.double().T + damped * weight[:, kept].double().T
        solved = torch.cholesky_solve(target, factor)
    new = torch.zeros_like(weight)
    new[:, kept] = solved.T.to(weight.dtype)
    return new, used
