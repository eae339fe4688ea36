"""Policies and their estimators: identities, exact probabilities, gradients by enumeration."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from secateur.structure.policy import Policy, gumbel, log_probability
from secateur.structure.policy_training import advantages, rewards, surrogate
from secateur.structure.prunenet import PruneNet

SEEDED = torch.Generator


def test_two_layers_without_a_nonlinearity_are_a_linear_policy() -> None:
    generator = SEEDED().manual_seed(0)
    state = torch.randn(1, 30, 8, generator=generator)
    policy = Policy.fresh("factored", (1, 30, 8), generator)
    own = {**policy.tensors, "b": torch.randn(30, generator=generator)}
    layers = (state[0] @ own["A"].T + own["b"]) @ own["v"]
    torch.testing.assert_close(Policy(own).logits(state), layers, rtol=1e-5, atol=1e-6)
    linear = Policy({"u": own["A"].T @ own["v"], "c": own["b"] @ own["v"]})
    torch.testing.assert_close(linear.logits(state), layers, rtol=1e-5, atol=1e-6)


def test_only_a_hidden_layer_sees_the_length_of_a_row() -> None:
    generator = SEEDED().manual_seed(1)
    state = torch.randn(2, 30, 8, generator=generator)
    scored = {name: Policy.fresh(name, (2, 30, 8), generator) for name in ("linear", "mlp")}
    odd = scored["linear"].logits(state) + scored["linear"].logits(-state)
    torch.testing.assert_close(odd, torch.zeros(30))
    both = scored["mlp"].logits(state) + scored["mlp"].logits(-state)
    assert both.std() > 1e-4


def exact(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All ordered draws, completed to permutations, and their probabilities one factor at a time."""
    orders, chances = [], []
    weights = logits.exp()
    for drawn in permutations(range(len(logits)), count):
        chance, left = torch.ones(()), weights.sum()
        for row in drawn:
            chance = chance * weights[row] / left
            left = left - weights[row]
        orders.append([*drawn, *(row for row in range(len(logits)) if row not in drawn)])
        chances.append(chance)
    return torch.tensor(orders), torch.stack(chances)


def test_probabilities_of_all_draws_are_exact_and_sum_to_one() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    orders, chances = exact(logits, 2)
    torch.testing.assert_close(log_probability(logits, orders, 2).exp(), chances)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-6)


def test_noise_draws_without_replacement() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    draws = 20_000
    drawn = (logits + gumbel((draws, 4), SEEDED().manual_seed(2))).argsort(descending=True)[:, :2]
    orders, chances = exact(logits, 2)
    counts = torch.stack([(drawn == order[:2]).all(1).sum() for order in orders])
    chi_square = ((counts - draws * chances).square() / (draws * chances)).sum()
    assert float(chi_square) < 31.3  # 99.9% of chi-square with 11 degrees of freedom


@pytest.mark.parametrize(("estimator", "unbiased"), [("plackett_luce", True), ("faithful", False)])
def test_the_gradient_is_that_of_the_expected_reward(estimator: str, unbiased: bool) -> None:
    """By enumeration of all draws of 2 of 5 rows; the published heuristic does not pass."""
    generator = SEEDED().manual_seed(3)
    logits = torch.randn(5, generator=generator).requires_grad_()
    worth = torch.rand(5, 5, generator=generator)
    worth = 1 + worth + worth.T

    def reward(orders: Tensor) -> Tensor:
        return worth[orders[:, 0], orders[:, 1]]

    orders, chances = exact(logits, 2)
    (expected,) = torch.autograd.grad((chances * reward(orders)).sum(), logits)
    method = PruneNet.from_options({"estimator": estimator})
    drawn = method.keys(logits.detach(), 40_000, generator).argsort(dim=1, descending=True)
    found = reward(drawn)
    loss = surrogate(estimator, logits, drawn, 2, advantages(found, []) if unbiased else found, generator)
    (estimated,) = torch.autograd.grad(-loss, logits)
    cosine = float(torch.cosine_similarity(estimated, expected, dim=0))
    assert cosine > 0.99 if unbiased else cosine < 0.9
    if unbiased:
        torch.testing.assert_close(estimated, expected, rtol=0.1, atol=0.01)


def test_advantages_compare_with_other_draws_or_earlier_episodes() -> None:
    found = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(advantages(found, [9.0]), torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))
    assert advantages(found[:1], []).tolist() == [0]
    assert advantages(found[:1], [3.0, 5.0]).tolist() == [-3]


def test_rewards_are_bounded_where_spectra_agree_and_fall_with_the_distance() -> None:
    dense = torch.arange(1.0, 11.0).double().view(1, 1, 10)
    cuts = torch.cat([dense, dense * 0.95, dense * 0.5])
    both = dense.expand(3, 1, 10)
    distances = torch.tensor([0, 0.1, 0.5])
    torch.testing.assert_close(rewards("neg_ks", both, cuts).float(), -distances)
    assert rewards("inv_ks", both, cuts).tolist() == pytest.approx([1e5, 10, 2])
    assert rewards("neg_log_ks", both, cuts).exp().tolist() == pytest.approx([20, 10, 2])
    assert rewards("w1", both, cuts).tolist() == pytest.approx([0, -0.05, -0.5])
    assert rewards("w1", 7 * both, 7 * cuts).tolist() == pytest.approx([0, -0.05, -0.5])
