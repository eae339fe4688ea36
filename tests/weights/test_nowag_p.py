"""NoWag-P: scale of rows and columns does not count, only what stands out of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from secateur.core.statistics import InputStatistics
from secateur.weights.nowag import normalise
from secateur.weights.nowag_p import NowagP

from .problems import draw, make_problem


def test_the_published_order_of_scales() -> None:
    problem = make_problem(6, 8)
    columns = [sum(float(w) ** 2 for w in column) ** 0.5 + 1e-5 for column in problem.weight.T]
    found = normalise(problem.weight, problem.inputs)
    for row, weights in enumerate(problem.weight):
        scaled = [float(w) / c for w, c in zip(weights, columns, strict=True)]
        norm = sum(w**2 for w in scaled) ** 0.5 + 1e-5
        assert found.rows[row] == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(found.matrix[row], torch.tensor(scaled) / norm)
    torch.testing.assert_close(found.restored(found.matrix), problem.weight)


def test_score_is_the_error_of_dropping_one_entry() -> None:
    problem = make_problem(3, 4)
    whole = normalise(problem.weight, problem.inputs)
    scores = NowagP().score(problem)
    moments = problem.inputs.second_moment / problem.inputs.second_moment.mean()
    for row, column in ((0, 0), (1, 3), (2, 2)):
        without = whole.matrix.clone()
        without[row, column] = 0
        error = ((without - whole.matrix).square().double() * moments).sum()
        assert float(scores[row, column]) == pytest.approx(float(error), rel=1e-5)


def test_the_scale_of_a_column_does_not_count() -> None:
    problem = make_problem(12, 32)
    other = replace(problem, weight=problem.weight * torch.logspace(-1, 2, 32))
    torch.testing.assert_close(NowagP().score(other), NowagP().score(problem), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_best_of_all_masks_in_its_own_error(seed: int) -> None:
    problem = make_problem(2, 4, pattern="2:4", seed=seed)
    kept = NowagP().prune(problem).kept
    whole = normalise(problem.weight, problem.inputs)
    for row in range(2):
        errors = {
            gone: float((whole.matrix[row, list(gone)].square() * whole.energy[list(gone)]).sum())
            for gone in combinations(range(4), 2)
        }
        best = min(errors, key=errors.__getitem__)
        assert (~kept[row]).nonzero().flatten().tolist() == list(best)


def test_moments_that_say_nothing_take_the_mean_of_the_others() -> None:
    moments = torch.tensor([1.0, 0.0, 3.0, float("inf"), -1.0, float("nan")], dtype=torch.float64)
    inputs = InputStatistics(columns=6, tokens=10, second_moment=moments)
    energy = normalise(draw((4, 6), 0), inputs).energy
    torch.testing.assert_close(energy, torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0, 1.0]))
