"""The numerics policy in code: precision of products, finiteness, damping. See docs/numerics.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.core.errors import NumericsError

__all__ = ["DAMPING_LIMIT", "damped_cholesky", "exact_products"]

DAMPING_LIMIT = 1.0


@contextmanager
def exact_products() -> Iterator[None]:
    """Full float32 products (no TF32) inside; the caller's setting is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def damped_cholesky(
    hessian: Tensor, damping: float, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, float]:
    """Lower Cholesky factor of `hessian + d * mean(diag) * I`, and the `d` that was needed.

    `d` starts at `damping` and grows tenfold up to 1 while the factorisation fails
    (one-shot-baselines, section 5). Nothing is substituted for a Hessian that stays singular.

    Args:
        hessian: (C, C), symmetric, float32 or float64; not changed.
        damping: first fraction of the mean diagonal to add.
        dtype: of the factor, by default that of the Hessian.

    Raises:
        NumericsError: entries that are not finite, or singular even with `d = 1`.
    """
    dtype = dtype or hessian.dtype
    mean = hessian.diagonal().to(dtype).mean()
    if not bool(torch.isfinite(mean)):
        raise NumericsError(
            "the Hessian has entries that are not finite: the calibration activations overflowed"
        )
    used = damping
    while True:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(used * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, used
        if used >= DAMPING_LIMIT:
            raise NumericsError(f"the Hessian stays singular with damping {used:g} of its mean diagonal")
        used = min(max(used, 1e-4) * 10, DAMPING_LIMIT)
