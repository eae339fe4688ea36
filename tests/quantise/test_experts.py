"""What the losses of the integer programme are made of."""

from __future__ import annotations

import pytest
import torch

from quantise.problems import draw
from secateur.core.allotment import allot
from secateur.quantise.experts import rounded_stack, rounding_losses, shares
from secateur.quantise.grid import rounded


def test_the_losses_of_the_worked_example() -> None:
    counts, weights = torch.tensor([40.0, 30, 20, 10]), torch.tensor([4.5, 3.0, 1.5, 1.0])
    errors = torch.tensor([[8, 3, 1], [6, 2.5, 1], [9, 4, 1.5], [5, 2, 0.8]])
    losses = rounding_losses(counts, weights, errors, 1, 1, 2)
    expected = [[11.52, 1.62, 0.18], [3.24, 0.5625, 0.09], [2.43, 0.48, 0.0675], [0.25, 0.04, 0.0064]]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_exponents_count() -> None:
    counts, weights, errors = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([[4.0], [4.0]])
    assert rounding_losses(counts, weights, errors, 0, 0, 1).tolist() == [[4.0], [4.0]]
    assert rounding_losses(counts, weights, errors, 0, 0, 0.5).tolist() == [[2.0], [2.0]]
    assert rounding_losses(counts, weights, errors, 2, 0, 0)[:, 0].tolist() == pytest.approx([0.5625, 0.0625])
    assert rounding_losses(counts, weights, errors, 0, 2, 0)[:, 0].tolist() == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_expert_without_tokens_takes_the_lowest(alpha: float) -> None:
    counts = torch.tensor([10.0, 0.0, 10.0])
    errors = torch.tensor([[3.0, 2, 1], [0, 0, 0], [3, 2, 1]])
    losses = rounding_losses(counts, counts, errors, alpha, alpha, 2)
    assert allot(losses.numpy(), torch.tensor([1, 2, 3]).numpy(), 9) == [2, 0, 2]


def test_shares_of_nothing_are_alike() -> None:
    assert shares(torch.zeros(4)).tolist() == [0.25] * 4


def test_a_stack_is_rounded_matrix_by_matrix() -> None:
    stack = draw((3, 5, 20), 1).half()
    new = rounded_stack({"w": stack}, 2, 8)["w"]
    assert new.dtype == torch.float16
    for one, own in zip(stack, new, strict=True):
        assert own.equal(rounded(one.float(), 2, 8).half())
