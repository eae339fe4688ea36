"""SparseGPT against its published loop, brute force and exact least squares."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateur.core.errors import NumericsError
from secateur.core.method import METHODS
from secateur.core.selection import drop_count
from secateur.core.sweep import hessian_factor
from secateur.weights.sparsegpt import SparseGPT
from secateur.weights.wanda import Wanda

from .problems import draw, make_problem, observe, output_error
from .published import published_factor, published_sparsegpt


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    wide = hessian.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def least_squares(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The best values on a mask, row by row, from the normal equations."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask in enumerate(kept):
        right = hessian[mask] @ weight[row].double()
        best[row, mask] = torch.linalg.solve(hessian[mask][:, mask], right)
    return best


def quadratic(change: Tensor, hessian: Tensor) -> float:
    return float(((change.double() @ hessian) * change.double()).sum())


def test_the_factor_is_the_inverse_of_the_published_one() -> None:
    statistics = make_problem(4, 48).inputs
    factor, used = hessian_factor(statistics, 0.01)
    assert used == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor @ factor.T).double(), damped(statistics.hessian), rtol=1e-4, atol=1e-3)
    published = published_factor(statistics.hessian.double(), 0.01)
    torch.testing.assert_close(factor.double().inverse(), published, rtol=1e-3, atol=1e-6)


def test_the_factor_is_computed_once_for_matrices_that_share_an_input() -> None:
    statistics = make_problem(4, 16).inputs
    assert hessian_factor(statistics, 0.01)[0] is hessian_factor(statistics, 0.01)[0]
    assert hessian_factor(statistics, 0.1)[0] is not hessian_factor(statistics, 0.01)[0]


@pytest.mark.parametrize("blocksize", [16, 37, 128])
@pytest.mark.parametrize("pattern", ["matrix", "2:4", "4:8", "1:4", "3:16"])
def test_equals_the_published_loop(pattern: str, blocksize: int) -> None:
    problem = make_problem(40, 160, pattern=pattern)
    if problem.pattern.kind == "n:m":
        blocksize -= blocksize % problem.pattern.of
    solution = SparseGPT(blocksize=blocksize).prune(problem)
    grouped = problem.pattern if problem.pattern.kind == "n:m" else None
    expected, loss = published_sparsegpt(
        problem.weight.double(), problem.inputs.hessian.double(), pattern=grouped, blocksize=blocksize
    )
    assert float(((expected != 0) == solution.kept).float().mean()) > 0.999
    assert solution.notes["obs_loss"] == pytest.approx(2 * loss / problem.inputs.sequences, rel=1e-3)
    assert output_error(problem, solution.weight) == pytest.approx(output_error(problem, expected), rel=1e-2)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
def test_the_losses_of_the_columns_add_up_to_the_change_of_the_output(pattern: str) -> None:
    problem = make_problem(16, 48, pattern=pattern)
    solution = SparseGPT(blocksize=16).prune(problem)
    hessian = 2 / problem.inputs.sequences * damped(problem.inputs.hessian)
    expected = 0.5 * quadratic(solution.weight - problem.weight, hessian)
    assert solution.notes["obs_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pattern", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.5, 0.37, 0.7, 0.93])
@pytest.mark.parametrize("blocksize", [7, 16, 128])
def test_counts_of_the_blocks_add_up_without_drift(pattern: str, sparsity: float, blocksize: int) -> None:
    problem = make_problem(13, 50, pattern=pattern, sparsity=sparsity)
    dropped = ~SparseGPT(blocksize=blocksize).prune(problem).kept
    if pattern == "row":
        assert (dropped.sum(1) == drop_count(50, sparsity)).all()
    else:
        assert int(dropped.sum()) == drop_count(650, sparsity)


@pytest.mark.parametrize("count", [1, 3])
def test_sequential_surgery_by_explicit_inverses(count: int) -> None:
    """Each step: the inverse of H over the columns that are left, from scratch, in float64."""
    problem = make_problem(5, 12, pattern="row", sparsity=count / 12)
    solution = SparseGPT(blocksize=12).prune(problem)
    hessian, weight = damped(problem.inputs.hessian), problem.weight.double().clone()
    for i in range(12):
        inverse = torch.linalg.inv(hessian[i:, i:])
        lost = torch.where(solution.kept[:, i], 0.0, weight[:, i])
        weight[:, i:] -= torch.outer(lost / inverse[0, 0], inverse[0])
    torch.testing.assert_close(solution.weight.double(), weight * solution.kept, rtol=1e-3, atol=1e-4)


def test_choice_of_one_weight_is_the_best_of_all() -> None:
    """With the columns before it frozen, removing weight i costs w^2 / U_ii^2: try them all."""
    problem = make_problem(1, 10, pattern="row", sparsity=0.1)
    hessian, costs = damped(problem.inputs.hessian), []
    for i in range(10):
        free = torch.arange(i, 10)
        target = problem.weight.double()[0]
        change = torch.zeros(10, dtype=torch.float64)
        rest = free[1:]
        change[i] = -target[i]
        if len(rest):
            change[rest] = torch.linalg.solve(hessian[rest][:, rest], -hessian[rest, i] * change[i])
        costs.append(quadratic(change[None], hessian))
    solution = SparseGPT(blocksize=10).prune(problem)
    assert solution.kept[0].logical_not().nonzero().item() == min(range(10), key=costs.__getitem__)
    assert solution.notes["obs_loss"] == pytest.approx(min(costs) / problem.inputs.sequences, rel=1e-4)


def test_never_below_the_exact_optimum_of_all_masks() -> None:
    problem = make_problem(1, 8, pattern="row", sparsity=0.25)
    hessian = damped(problem.inputs.hessian)
    best = min(
        quadratic(least_squares(problem.weight, hessian, mask[None]) - problem.weight.double(), hessian)
        for mask in (
            torch.ones(8, dtype=torch.bool).scatter(0, torch.tensor(pair), False)
            for pair in combinations(range(8), 2)
        )
    )
    reached = SparseGPT().prune(problem).notes["obs_loss"] * problem.inputs.sequences
    assert reached >= best * (1 - 1e-5)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
def test_between_the_bare_mask_and_least_squares(pattern: str) -> None:
    problem = make_problem(20, 64, pattern=pattern)
    solution = SparseGPT(blocksize=64).prune(problem)
    hessian, dense = damped(problem.inputs.hessian), problem.weight.double()
    exact = quadratic(least_squares(problem.weight, hessian, solution.kept) - dense, hessian)
    updated = quadratic(solution.weight - dense, hessian)
    bare = quadratic(problem.weight * solution.kept - dense, hessian)
    assert exact * (1 - 1e-5) <= updated < bare


def test_independent_inputs_need_no_update_and_rank_like_wanda() -> None:
    problem = make_problem(16, 24, pattern="row")
    energies = draw((24,), 3).square() + 0.1
    problem.inputs.hessian = energies.diag()
    problem.inputs.second_moment = energies.double()
    solution = SparseGPT(blocksize=24, damping=0.0).prune(problem)
    assert torch.equal(solution.kept, Wanda().prune(problem).kept)
    assert torch.equal(solution.weight, problem.weight * solution.kept)


@pytest.mark.parametrize("mask", ["wanda", "magnitude", "random", "ria"])
@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
def test_update_only(mask: str, pattern: str) -> None:
    problem = make_problem(20, 64, pattern=pattern)
    chosen = METHODS.get(mask)().prune(make_problem(20, 64, pattern=pattern))
    solution = SparseGPT(mask=mask).prune(problem)
    assert torch.equal(solution.kept, chosen.kept)
    assert output_error(problem, solution.weight) < output_error(problem, chosen.weight)


def test_update_only_asks_for_the_statistics_of_both() -> None:
    assert SparseGPT().statistics == {"hessian"}
    assert SparseGPT(mask="wanda").statistics == {"hessian", "second_moment"}


def test_damping_is_raised_and_said() -> None:
    problem = make_problem(8, 64, inputs=draw((4, 64), 0))
    solution = SparseGPT(damping=0.0).prune(problem)
    assert "damping raised from 0" in solution.fallbacks[0]
    assert solution.weight.isfinite().all()


def test_silent_inputs_keep_the_weights_the_mask_keeps() -> None:
    inputs = draw((200, 16), 1)
    inputs[:, 3] = 0
    problem = make_problem(8, 16, pattern="2:4", inputs=inputs)
    problem.weight[:, 3] = 100.0  # the damping alone is curvature enough to keep it
    solution = SparseGPT().prune(problem)
    assert torch.equal(solution.weight[:, 3], problem.weight[:, 3])
    assert "1 of 16 inputs" in solution.fallbacks[0]


@pytest.mark.parametrize("hessian", [torch.zeros(16, 16), torch.full((16, 16), float("nan"))])
def test_a_hessian_without_answer_is_an_error(hessian: Tensor) -> None:
    problem = make_problem(4, 16)
    problem.inputs.hessian = hessian
    with pytest.raises(NumericsError):
        SparseGPT().prune(problem)


def test_blocks_hold_whole_groups() -> None:
    """A block size that does not divide by M is rounded down, never through a group."""
    problem = make_problem(8, 32, pattern="3:8")
    assert torch.equal(
        SparseGPT(blocksize=13).prune(problem).kept,
        SparseGPT(blocksize=8).prune(problem).kept,
    )


def test_more_calibration_sequences_do_not_change_the_solution() -> None:
    inputs = draw((128, 32), 2)
    first, second = make_problem(8, 32, inputs=inputs), make_problem(8, 32, inputs=inputs)
    second.inputs = observe(inputs, sequences=32)
    a, b = SparseGPT().prune(first), SparseGPT().prune(second)
    assert torch.equal(a.weight, b.weight)
    assert a.notes["obs_loss"] == pytest.approx(8 * b.notes["obs_loss"])


def test_the_result_is_contiguous() -> None:
    solution = SparseGPT().prune(make_problem(8, 32, pattern="matrix"))
    assert solution.weight.is_contiguous()
    assert solution.kept.is_contiguous()
