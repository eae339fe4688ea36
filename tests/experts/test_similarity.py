"""Distances between experts, in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experts.problems import make_problem, make_routing
from secateur.core.errors import RecipeError
from secateur.experts.similarity import (
    coactivation_distance,
    output_distance,
    router_cosine,
    router_distance,
)

ALL = (router_distance, router_cosine, coactivation_distance, output_distance)


@pytest.mark.parametrize("distance", ALL)
def test_symmetric_zero_on_the_diagonal_and_indifferent_to_order(distance: object) -> None:
    problem = make_problem()
    found = distance(problem)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(distance(problem.part(order)), found[order][:, order])


def test_router_rows() -> None:
    problem = replace(make_problem(3), router=torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]]))
    expected = torch.tensor([[0.0, 5.0, 4.0], [5.0, 0.0, 3.0], [4.0, 3.0, 0.0]]).double()
    assert torch.equal(router_distance(problem, scaled=False), expected)
    torch.testing.assert_close(router_distance(problem), expected / 41**0.5)
    biased = replace(problem, bias=torch.tensor([0.0, 0.0, 3.0]))
    assert router_distance(biased, scaled=False)[0, 2] == 5


def test_the_cosine_does_not_see_the_norm_of_a_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    found = router_cosine(replace(make_problem(4), router=rows))
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0, 2.0]).double())


def test_coactivation_is_relative_to_the_mean_of_the_whole_matrix() -> None:
    routing = make_routing(torch.tensor([[0, 1], [1, 0], [0, 2]]), 3)
    found = coactivation_distance(replace(make_problem(3), routing=routing))
    together = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(found, -together / (6 / 9))


def test_coactivation_needs_two_experts_a_token() -> None:
    with pytest.raises(RecipeError, match=r"0\.experts.*visits 1 expert"):
        coactivation_distance(replace(make_problem(), top_k=1))


def test_outputs_are_compared_in_units_of_their_mean_distance() -> None:
    problem = make_problem()
    means = problem.observed.means / problem.observed.tokens
    found = output_distance(problem)
    assert found.sum() / 56 == pytest.approx(1)
    ratio = (means[0] - means[1]).norm() / (means[2] - means[3]).norm()
    assert found[0, 1] / found[2, 3] == pytest.approx(float(ratio))
