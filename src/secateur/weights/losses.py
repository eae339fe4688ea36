"""What a change of one matrix does to its own output."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.numerics import exact_products
from secateur.core.statistics import InputStatistics

__all__ = ["reconstruction_loss"]


def reconstruction_loss(
    weight: Tensor, new: Tensor, inputs: InputStatistics, *, rows: int | None = None
) -> float | None:
    """Relative squared error of the output, tr(dW H dW^T) / tr(W H W^T).

    H is the Hessian where it was observed, else its diagonal, the second moment. With the Hessian the
    exact value costs two products of the size of the update itself.

    Args:
        weight: (..., out, in) before, float32.
        new: (..., out, in) after.
        inputs: statistics of the input.
        rows: estimate from at most so many evenly spaced output rows; `None` takes all.

    Returns:
        `None` where nothing was observed or the output was zero anyway.
    """
    if inputs.hessian is None and inputs.second_moment is None:
        return None
    step = 1 if rows is None else max(-(-weight.shape[-2] // rows), 1)
    before = weight[..., ::step, :].float()
    change = new[..., ::step, :].float() - before
    with exact_products():
        energies = torch.stack([_energy(change, inputs), _energy(before, inputs)])
    lost, total = energies.tolist()
    return lost / total if total > 0 else None


def _energy(matrix: Tensor, inputs: InputStatistics) -> Tensor:
    """Sum over output rows w of w H w^T, float64 scalar."""
    if inputs.hessian is not None:
        return (matrix @ inputs.hessian).mul_(matrix).sum(dtype=torch.float64)
    assert inputs.second_moment is not None
    squares = matrix.square().flatten(0, -2).sum(0, dtype=torch.float64)
    return squares @ inputs.second_moment.double()
