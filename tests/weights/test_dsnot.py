"""DSnoT against a plain loop over the rows, and its promise: |eps| falls, counts stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.core.method import METHODS
from secateur.weights.base import Problem
from secateur.weights.dsnot import Dsnot
from secateur.weights.wanda import Wanda

from .problems import make_problem


def eps(problem: Problem, kept: Tensor) -> Tensor:
    mean = (problem.inputs.mean / problem.inputs.sequences).float()
    return (problem.weight * mean * ~kept).sum(1)


def plain(problem: Problem, cycles: int, threshold: float, overshoot: bool) -> Tensor:
    """Section 2.9 row by row."""
    inputs, width = problem.inputs, problem.pattern.of
    mean = inputs.mean / inputs.sequences
    variance = inputs.second_moment / inputs.tokens - (inputs.mean / inputs.tokens) ** 2
    importance = problem.weight.double().abs() * (inputs.second_moment / inputs.sequences).sqrt()
    result = Wanda().prune(problem).kept
    for row in range(len(result)):
        kept, effect = result[row], problem.weight[row].double() * mean
        error = float(effect[~kept].sum())
        candidates = set((~kept).nonzero().flatten().tolist())
        droppable = set(kept.nonzero().flatten().tolist())
        for _ in range(cycles):
            sign = 1 if error > 0 else -1
            back = [j for j in candidates if sign * effect[j] > 0]
            if abs(error) <= threshold or not back:
                break
            regrown = max(back, key=lambda j: sign * float(effect[j] / variance[j]))
            candidates.discard(regrown)
            out = [
                j for j in droppable if sign * effect[j] < 0 and (not width or j // width == regrown // width)
            ]
            if not out:
                continue
            dropped = min(out, key=lambda j: float(importance[row, j]))
            after = error + float(effect[dropped] - effect[regrown])
            if not overshoot and abs(after) >= abs(error):
                break
            droppable.discard(dropped)
            kept[regrown], kept[dropped], error = True, False, after
    return result


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "4:8"])
@pytest.mark.parametrize("cycles", [1, 5, 50])
@pytest.mark.parametrize("overshoot", [False, True])
def test_equals_the_loop_over_rows(pattern: str, cycles: int, overshoot: bool) -> None:
    problem = make_problem(20, 64, pattern=pattern, sparsity=0.6, seed=3)
    expected = plain(problem, cycles, 0.1, overshoot)
    assert torch.equal(Dsnot(cycles=cycles, overshoot=overshoot).prune(problem).kept, expected)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "4:8"])
def test_error_of_the_mean_falls_in_every_row(pattern: str) -> None:
    problem = make_problem(20, 64, pattern=pattern, sparsity=0.6)
    solution = Dsnot().prune(problem)
    before, after = eps(problem, Wanda().prune(problem).kept).abs(), eps(problem, solution.kept).abs()
    assert (after <= before + 1e-4).all()
    assert after.mean() < 0.5 * before.mean()
    assert solution.notes["mean_error_after"] == pytest.approx(float(after.mean()), rel=1e-2, abs=1e-3)
    assert solution.notes["mean_error_before"] == pytest.approx(float(before.mean()), rel=1e-3)


def test_every_row_keeps_its_count() -> None:
    problem = make_problem(20, 64, pattern="matrix")
    assert torch.equal(Dsnot().prune(problem).kept.sum(1), Wanda().prune(problem).kept.sum(1))


@pytest.mark.parametrize("changes", [{"cycles": 0}, {"threshold": 1e9}])
def test_nothing_to_do_is_the_base(changes: dict[str, float]) -> None:
    problem = make_problem(20, 64)
    assert torch.equal(Dsnot(**changes).prune(problem).kept, Wanda().prune(problem).kept)


@pytest.mark.parametrize("base", ["magnitude", "ria", "sparsegpt", "random"])
def test_any_base_keeps_the_dense_values(base: str) -> None:
    problem = make_problem(20, 64)
    solution = Dsnot(base=base).prune(problem)
    problem.generator.manual_seed(0)
    start = METHODS.get(base)().prune(problem)
    assert torch.equal(solution.weight, problem.weight.masked_fill(~solution.kept, 0))
    assert eps(problem, solution.kept).abs().mean() < eps(problem, start.kept).abs().mean()


def test_statistics_of_the_base_are_asked_for() -> None:
    assert Dsnot().statistics == {"second_moment", "mean"}
    assert Dsnot(base="sparsegpt").statistics == {"second_moment", "mean", "hessian"}


def test_constant_inputs_do_not_divide_by_zero() -> None:
    inputs = torch.ones(40, 16)
    inputs[:, 8:] = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    problem = make_problem(6, 16, inputs=inputs)
    assert (Dsnot().prune(problem).kept.sum(1) == 8).all()
