"""ALPS: exact where the answer is known, and never behind its own projection."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateur.core.errors import NumericsError
from secateur.weights.alps import Alps, _Penalty
from secateur.weights.base import Problem
from secateur.weights.magnitude import Magnitude
from secateur.weights.sparsegpt import SparseGPT
from secateur.weights.wanda import Wanda

from .problems import draw, make_problem, output_error


def damped_error(problem: Problem, new: Tensor) -> float:
    hessian = problem.inputs.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    change = (new - problem.weight).double()
    return float(((change @ hessian) * change).sum())


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "4:8"])
def test_below_sparsegpt_wanda_and_magnitude(pattern: str) -> None:
    errors: dict[str, float] = {}
    for seed in range(4):
        problem = make_problem(24, 64, pattern=pattern, sparsity=0.6, seed=10 * seed)
        for method in (Alps(), SparseGPT(blocksize=64), Wanda(), Magnitude()):
            error = output_error(problem, method.prune(problem).weight)
            errors[method.id] = errors.get(method.id, 0.0) + error
    assert errors["alps"] <= errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_conjugate_gradients_reach_least_squares_on_the_support() -> None:
    problem = make_problem(6, 16, pattern="row", sparsity=0.5)
    solution = Alps(pcg_steps=200).prune(problem)
    hessian = problem.inputs.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    for row, mask in enumerate(solution.kept):
        right = hessian[mask] @ problem.weight[row].double()
        exact = torch.linalg.solve(hessian[mask][:, mask], right)
        torch.testing.assert_close(solution.weight[row, mask].double(), exact, rtol=1e-3, atol=1e-3)


def test_conjugate_gradients_only_help() -> None:
    problem = make_problem(24, 64, pattern="matrix", sparsity=0.7)
    without, some, more = (Alps(pcg_steps=steps).prune(problem) for steps in (0, 3, 10))
    assert torch.equal(without.kept, more.kept)
    errors = [damped_error(problem, each.weight) for each in (more, some, without)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("seed", range(4))
def test_among_the_best_masks_of_all(seed: int) -> None:
    problem = make_problem(1, 12, pattern="row", sparsity=0.5, seed=seed)
    hessian = problem.inputs.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    masks = torch.ones(924, 12, dtype=torch.bool)
    for mask, gone in zip(masks, combinations(range(12), 6), strict=True):
        mask[list(gone)] = False
    inside = masks.double()
    # rows and columns outside the mask become those of the identity, so that all masks solve at once
    systems = inside[:, :, None] * hessian * inside[:, None] + torch.diag_embed(1 - inside)
    dense = problem.weight[0].double()
    best = torch.linalg.solve(systems, inside * (hessian @ dense))
    costs = ((best - dense) @ hessian * (best - dense)).sum(1)
    reached = damped_error(problem, Alps(pcg_steps=50).prune(problem).weight)
    assert float((costs < reached * (1 - 1e-4)).double().mean()) < 0.05


def test_independent_inputs_keep_their_values() -> None:
    problem = make_problem(12, 24, pattern="row")
    problem.inputs.hessian = (draw((24,), 3).square() + 0.1).diag()
    solution = Alps().prune(problem)
    torch.testing.assert_close(solution.weight, problem.weight * solution.kept, rtol=1e-4, atol=1e-5)


def test_one_decomposition_for_matrices_that_share_an_input() -> None:
    first = make_problem(8, 32, pattern="matrix")
    second = replace(first, weight=draw((12, 32), 99))
    Alps().prune(first)
    cached = dict(first.inputs.cache)
    Alps().prune(second)
    assert first.inputs.cache == cached
    assert len(cached) == 1


def test_scaling_all_inputs_changes_nothing() -> None:
    problem = make_problem(8, 32, pattern="matrix")
    first = Alps().prune(problem)
    scaled = replace(problem, inputs=replace(problem.inputs, hessian=problem.inputs.hessian * 256, cache={}))
    second = Alps().prune(scaled)
    assert torch.equal(first.kept, second.kept)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)


def test_a_hessian_that_is_not_finite_is_an_error() -> None:
    problem = make_problem(4, 16)
    problem.inputs.hessian[3, 3] = float("inf")
    with pytest.raises(NumericsError, match="finite"):
        Alps().prune(problem)


def test_schedule_of_the_penalty() -> None:
    penalty = _Penalty(1.0)
    assert not penalty.finished(0, 1000, 3), "nothing has moved yet: the penalty is too high"
    assert not penalty.update(0, 1000)
    assert penalty.rho == pytest.approx(0.2)
    assert penalty.update(2, 1000), "few changes before the first increase: lower, and start again"
    assert penalty.rho == pytest.approx(0.04)
    assert not penalty.update(200, 1000)
    assert penalty.rho == pytest.approx(0.04 * 1.3)
    penalty.update(10, 1000)
    assert penalty.rho == pytest.approx(0.04 * 1.3 * 1.2)
    penalty.update(2, 1000)
    assert penalty.rho == pytest.approx(0.04 * 1.3 * 1.2 * 1.1)
    assert penalty.finished(0, 1000, 15)
    assert penalty.finished(1, 10_000, 30)
    assert not penalty.finished(1, 10_000, 27)
