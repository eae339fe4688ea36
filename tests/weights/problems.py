"""Small pruning problems with correlated inputs, and what the tests measure on them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics
from secateur.weights.base import Problem


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(columns: int, tokens: int, seed: int) -> Tensor:
    """(tokens, columns) with a common direction, unequal scales and a mean that is not zero."""
    mixing = torch.eye(columns) + 0.3 * draw((columns, columns), seed)
    return draw((tokens, columns), seed + 1) @ mixing + 0.5 * draw((columns,), seed + 2)


def observe(inputs: Tensor, sequences: int = 4) -> InputStatistics:
    """Everything calibration could say of (tokens, columns) inputs."""
    wide = inputs.double()
    return InputStatistics(
        columns=inputs.shape[1],
        tokens=inputs.shape[0],
        sequences=sequences,
        second_moment=wide.square().sum(0),
        mean=wide.sum(0),
        hessian=(wide.T @ wide).float(),
    )


def make_problem(
    rows: int = 24,
    columns: int = 32,
    *,
    pattern: str = "row",
    sparsity: float = 0.5,
    seed: int = 0,
    inputs: Tensor | None = None,
) -> Problem:
    if inputs is None:
        inputs = correlated_inputs(columns, 4 * columns, seed)
    parsed = Pattern.parse(pattern)
    return Problem(
        name="3.mlp.up_proj",
        weight=draw((rows, columns), seed + 7),
        inputs=observe(inputs),
        pattern=parsed,
        sparsity=sparsity if parsed.sparsity is None else parsed.sparsity,
        gradient=draw((rows, columns), seed + 8).abs(),
        generator=torch.Generator().manual_seed(seed),
    )


def output_error(problem: Problem, new: Tensor) -> float:
    """tr(dW H dW^T), the squared error of the output over the calibration tokens, in float64."""
    change = (new - problem.weight).double()
    return float(((change @ problem.inputs.hessian.double()) * change).sum())
