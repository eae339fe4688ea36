"""Matrices to round, with correlated inputs, and what their rounding costs."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.statistics import InputStatistics


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(columns: int, tokens: int, seed: int) -> InputStatistics:
    """Of inputs with a common direction and unequal scales."""
    mixing = torch.eye(columns) + 0.3 * draw((columns, columns), seed)
    inputs = (draw((tokens, columns), seed + 1) @ mixing + 0.5 * draw((columns,), seed + 2)).double()
    return InputStatistics(columns, tokens, 4, inputs.square().sum(0), hessian=(inputs.T @ inputs).float())


def layer_loss(weight: Tensor, new: Tensor, inputs: InputStatistics) -> float:
    """tr(D H D^T) in float64."""
    assert inputs.hessian is not None
    change = (new - weight).double()
    return float(((change @ inputs.hessian.double()) * change).sum())
