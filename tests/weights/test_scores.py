"""Methods that are one score: closed forms and equivalences."""

from __future__ import annotations

import pytest
import torch

from secateur.anatomy.permute import Reorder
from secateur.core.method import METHODS
from secateur.core.pattern import Pattern
from secateur.core.selection import select
from secateur.core.statistics import InputStatistics
from secateur.weights.gblm import Gblm
from secateur.weights.magnitude import Magnitude
from secateur.weights.random import Random
from secateur.weights.ria import Ria
from secateur.weights.wanda import Wanda

from .problems import draw, make_problem


def test_wanda_with_equal_inputs_is_magnitude_within_rows() -> None:
    problem = make_problem(pattern="row")
    problem.inputs.second_moment = torch.full((32,), 7.0, dtype=torch.float64)
    assert torch.equal(Wanda().prune(problem).kept, Magnitude().prune(problem).kept)


def test_wanda_by_hand() -> None:
    problem = make_problem(1, 4, pattern="row", inputs=torch.ones(1, 4))
    problem.weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    problem.inputs.second_moment = torch.tensor([1.0, 4.0, 100.0, 1.0], dtype=torch.float64)
    problem.inputs.sequences = 1
    assert Wanda().score(problem).tolist() == [[4.0, 6.0, 20.0, 1.0]]
    assert Wanda().prune(problem).weight.tolist() == [[0.0, -3.0, 2.0, 0.0]]


def test_magnitude_drops_the_smallest_of_the_matrix() -> None:
    problem = make_problem(pattern="matrix", sparsity=0.3)
    solution = Magnitude().prune(problem)
    assert problem.weight[~solution.kept].abs().max() <= problem.weight[solution.kept].abs().min()


def test_random_depends_on_the_generator_alone() -> None:
    def kept(seed: int) -> torch.Tensor:
        problem = make_problem()
        problem.generator = torch.Generator().manual_seed(seed)
        return Random().prune(problem).kept

    torch.manual_seed(0)
    first = kept(1)
    torch.manual_seed(99)
    assert torch.equal(first, kept(1))
    assert not torch.equal(first, kept(2))


def test_ria_by_hand() -> None:
    problem = make_problem(2, 2, pattern="matrix", inputs=torch.ones(1, 2))
    problem.weight = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    problem.inputs.second_moment = torch.tensor([16.0, 1.0], dtype=torch.float64)
    problem.inputs.sequences = 1
    relative = torch.tensor([[1 / 3 + 1 / 4, 3 / 5 + 3 / 4], [2 / 3 + 2 / 4, 2 / 5 + 2 / 4]])
    torch.testing.assert_close(Ria().score(problem), relative * torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(Ria(a=0.0).score(problem), relative)


def test_ria_with_a_row_and_a_column_of_zeros() -> None:
    problem = make_problem(6, 8, pattern="matrix")
    problem.weight[2] = 0
    problem.weight[:, 5] = 0
    scores = Ria().score(problem)
    assert scores.isfinite().all()
    assert (scores[2] == 0).all()


def test_ria_permutes_only_what_can_be_folded() -> None:
    problem = make_problem(16, 32, pattern="2:4")
    plain = Ria().prune(problem)
    refused = Ria(permutation="hungarian").prune(problem)
    assert torch.equal(plain.kept, refused.kept)
    assert refused.orders is None
    assert "cannot be folded" in refused.fallbacks[0]

    problem.reorder = Reorder("ffn", 1, 1, 32, inside=False)
    solution = Ria(permutation="hungarian").prune(problem)
    assert solution.orders is not None
    order = solution.orders[0]
    assert torch.equal(order.sort().values, torch.arange(32))
    assert (solution.kept[:, order].view(16, -1, 4).sum(-1) == 2).all()
    scores = Ria().score(problem)
    assert (scores * solution.kept).sum() > (scores * plain.kept).sum()


def test_ria_reorders_inside_value_heads_that_query_heads_share() -> None:
    problem = make_problem(16, 32, pattern="2:4")
    problem.reorder = Reorder("kv_heads", 2, 2, 8, inside=True)
    solution = Ria(permutation="hungarian").prune(problem)
    assert solution.orders is not None
    assert solution.orders.shape == (2, 8)
    first, second = (own.tolist() for own in solution.orders)
    heads = [first, [8 + at for at in first], [16 + at for at in second], [24 + at for at in second]]
    order = torch.tensor(heads).flatten()
    assert torch.equal(problem.reorder.columns(solution.orders), order)
    assert (solution.kept[:, order].view(16, -1, 4).sum(-1) == 2).all()
    scores = Ria().score(problem)
    assert (scores * solution.kept).sum() > (scores * Ria().prune(problem).kept).sum()


def test_ria_leaves_heads_alone_that_groups_do_not_divide() -> None:
    problem = make_problem(16, 24, pattern="2:4")
    problem.reorder = Reorder("kv_heads", 4, 1, 6, inside=True)
    solution = Ria(permutation="snake").prune(problem)
    assert solution.orders is None
    assert "cannot be folded" in solution.fallbacks[0]


def test_ria_unstructured_ignores_the_permutation() -> None:
    problem = make_problem(pattern="matrix")
    assert Ria(permutation="snake").prune(problem).fallbacks == []


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_gblm_without_gradient_term_is_wanda_bit_for_bit(pattern: str) -> None:
    problem = make_problem(pattern=pattern)
    assert torch.equal(Gblm(alpha=0.0).score(problem), Wanda().score(problem))
    assert torch.equal(Gblm(alpha=0.0).prune(problem).weight, Wanda().prune(problem).weight)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
def test_gblm_with_a_huge_alpha_is_the_gradient_alone(pattern: str) -> None:
    problem = make_problem(pattern=pattern)
    huge, alone = Gblm(alpha=2.0**60).prune(problem), Gblm(activations=False).prune(problem)
    assert torch.equal(huge.kept, alone.kept)
    expected = select(problem.weight.abs() * problem.gradient, problem.pattern, 0.5)
    assert torch.equal(alone.kept, expected)


def test_gblm_scaling_the_loss_and_alpha_the_other_way_is_no_change() -> None:
    problem = make_problem()
    before = Gblm(alpha=64.0).prune(problem).kept
    problem.gradient *= 16
    assert torch.equal(Gblm(alpha=4.0).prune(problem).kept, before)


def test_gblm_drops_the_weight_the_loss_does_not_feel() -> None:
    """One neuron t = w.x with squared loss: the gradient is 2 (w.x - t) x, in closed form."""
    inputs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    weight, targets = torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 3.0])
    per_sample = torch.stack([2 * (weight[0] @ x - t) * x for x, t in zip(inputs, targets, strict=True)])
    problem = make_problem(1, 2, inputs=inputs)
    problem.weight = weight
    problem.gradient = per_sample.abs().sum(0, keepdim=True)
    problem.gradient[0, 0] += 1e-3  # the two inputs are otherwise alike
    assert Gblm(norm="l1").prune(problem).kept.tolist() == [[True, False]]


@pytest.mark.parametrize(("norm", "divisor"), [("l1", 4.0), ("l2", 2.0)])
def test_gblm_mean_does_not_depend_on_the_number_of_sequences(norm: str, divisor: float) -> None:
    problem = make_problem()
    options = {"norm": norm, "alpha": 3.0, "normalise": "mean"}
    scores = Gblm(**options).score(problem)
    norms = problem.inputs.input_norms()
    assert problem.inputs.sequences == 4
    expected = problem.weight.abs() * (norms + 3.0 * problem.gradient / divisor)
    torch.testing.assert_close(scores, expected)


def test_gblm_reports_the_ratio_of_its_terms() -> None:
    problem = make_problem()
    problem.inputs.second_moment = torch.full((32,), 16.0, dtype=torch.float64)  # four sequences: norm 2
    problem.gradient = torch.full((24, 32), 0.5)
    assert Gblm(alpha=8.0).prune(problem).notes["gradient_to_activation"] == pytest.approx(2.0)


def test_gblm_says_when_the_gradient_is_zero() -> None:
    problem = make_problem()
    problem.gradient = torch.zeros(24, 32)
    solution = Gblm().prune(problem)
    assert torch.equal(solution.kept, Wanda().prune(problem).kept)
    assert "zero everywhere" in solution.fallbacks[0]


def test_gblm_needs_activations_only_where_it_uses_them() -> None:
    assert Gblm().statistics == {"second_moment", "gradient"}
    assert Gblm(activations=False).statistics == {"gradient"}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "gblm"])
def test_narrower_groups_retain_less_score(method: str) -> None:
    """50% of a row >= 4:8 >= 2:4, exactly, because the scores of single weights add up."""
    retained = []
    for pattern in ("row", "4:8", "2:4"):
        problem = make_problem(16, 64, pattern=pattern)
        scores = METHODS.get(method)().score(problem)
        retained.append(float((scores * METHODS.get(method)().prune(problem).kept).double().sum()))
    assert retained[0] >= retained[1] >= retained[2]


def test_a_2_of_4_mask_is_also_4_of_8() -> None:
    kept = Wanda().prune(make_problem(16, 64, pattern="2:4")).kept
    assert (kept.view(16, -1, 8).sum(-1) == 4).all()


def test_never_reached_by_the_diagonal_of_the_hessian() -> None:
    assert InputStatistics(columns=3, tokens=5, hessian=torch.zeros(3, 3)).never_reached
    assert not InputStatistics(columns=3, tokens=5, hessian=torch.eye(3)).never_reached


def test_an_infinite_score_of_wanda_is_kept() -> None:
    problem = make_problem(1, 4, pattern="2:4", inputs=draw((8, 4), 0))
    problem.weight[0, 1] = float("inf")
    assert select(Wanda().score(problem), Pattern.parse("2:4"), 0.5)[0, 1]
