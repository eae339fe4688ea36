"""Prune the matrices of one open block."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.anatomy.model import Matrix
from secateur.anatomy.permute import permute, reorder_of
from secateur.calibration.driver import OpenBlock
from secateur.core.errors import NumericsError
from secateur.core.factored import Factored
from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics
from secateur.report.model import Layer
from secateur.weights.base import Problem, Solution, WeightMethod, weight_method
from secateur.weights.losses import reconstruction_loss

LOSS_ROWS = 256
"""Rows a loss is estimated from where the exact one would cost more than the method itself."""

__all__ = ["Budget", "generator_for", "prune_block", "statistics_of"]


@dataclass(frozen=True)
class Budget:
    """How much goes where: one pattern, a sparsity a block, and for `global` one a matrix.

    Attributes:
        pattern: resolved comparison group inside a matrix (`row`, `matrix` or `n:m`).
        blocks: sparsity of each block.
        matrices: sparsity of single matrices (`3.self_attn.q_proj`), which wins over the block's.
    """

    pattern: Pattern
    blocks: tuple[float, ...]
    matrices: Mapping[str, float]

    def of(self, block: int, matrix: str) -> float:
        return self.matrices.get(f"{block}.{matrix}", self.blocks[block])


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and the matrix alone, so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def statistics_of(matrix: Matrix, observed: Mapping[str, list[InputStatistics]]) -> InputStatistics:
    """The statistics of the input of `matrix`; empty ones where nothing was observed."""
    found = observed.get(matrix.input)
    if found is None:
        return InputStatistics(columns=matrix.shape[1])
    return found[matrix.expert or 0]


def prune_block(
    opened: OpenBlock,
    method: WeightMethod,
    budget: Budget,
    observed: Mapping[str, list[InputStatistics]],
    gradients: Mapping[str, Tensor],
    seed: int,
    factored: dict[str, Factored] | None = None,
) -> list[Layer]:
    """Prune every matrix of the block in place and say what was done, a row a matrix.

    `factored` takes, by name, the factors of matrices that are to be stored as such.
    """
    rows = []
    for matrix in opened.block.matrices:
        inputs = statistics_of(matrix, observed)
        row, factors = _prune_matrix(opened, matrix, method, budget, inputs, gradients, seed)
        rows.append(row)
        if factors is not None and factored is not None:
            factored[matrix.name] = factors
    return rows


def _prune_matrix(
    opened: OpenBlock,
    matrix: Matrix,
    method: WeightMethod,
    budget: Budget,
    inputs: InputStatistics,
    gradients: Mapping[str, Tensor],
    seed: int,
) -> tuple[Layer, Factored | None]:
    started = time.perf_counter()
    view = matrix.view(opened.parameters)
    name = f"{opened.index}.{matrix.name}"
    gradient = gradients.get(matrix.name)
    problem = Problem(
        name=name,
        weight=view.detach().float().contiguous(),  # a method does not change it: no copy where it is float32
        inputs=inputs,
        pattern=budget.pattern,
        sparsity=budget.of(opened.index, matrix.name),
        gradient=None if gradient is None else gradient.to(view.device, torch.float32),
        generator=generator_for(seed, name),
        reorder=reorder_of(opened.block, matrix),
    )
    solution = solve(method, problem)
    loss = reconstruction_loss(problem.weight, solution.weight, inputs, rows=LOSS_ROWS)
    with torch.no_grad():
        view.copy_(solution.weight)
    if solution.orders is not None and problem.reorder is not None:
        permute(opened.block, opened.parameters, problem.reorder, solution.orders)
    row = Layer(
        block=opened.index,
        matrix=matrix.name,
        rows=matrix.shape[0],
        columns=matrix.shape[1],
        sparsity_requested=problem.sparsity,
        sparsity=1 - int(solution.kept.sum()) / solution.kept.numel(),
        loss=loss,
        seconds=time.perf_counter() - started,
        notes=solution.notes,
        fallbacks=solution.fallbacks,
    )
    return row, solution.factored


def solve(method: WeightMethod, problem: Problem) -> Solution:
    """Prune one matrix, by magnitude where no calibration token reached it (said in `fallbacks`).

    Raises:
        NumericsError: with the name of the matrix.
    """
    if method.statistics - {"gradient"} and problem.inputs.never_reached:
        solution = weight_method("magnitude").prune(problem)
        reason = "no calibration token" if problem.inputs.tokens == 0 else "only zeros"
        solution.fallbacks.append(f"{reason} reached this input: pruned by magnitude")
        return solution
    try:
        solution = method.prune(problem)
    except NumericsError as error:
        raise NumericsError(f"{problem.name}: {error}") from error
    if not bool(torch.isfinite(solution.weight).all()):
        raise NumericsError(f"{problem.name}: {type(method).__name__} gave weights that are not finite")
    return solution
