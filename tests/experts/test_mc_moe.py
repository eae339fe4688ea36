"""What is asked of the bits of experts, and what they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.core.errors import RecipeError
from secateur.core.method import METHODS
from secateur.experts.precision import PrecisionMethod, Rounding


def method(name: str = "mc-moe", **options: Any) -> PrecisionMethod:
    made = METHODS.get(name).from_options(options)
    assert isinstance(made, PrecisionMethod)
    return made


def observed(block: int = 0, count: int = 8, seed: int = 0, scale: float = 1.0) -> Rounding:
    """Of trained experts: fewer bits, larger errors."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, count, generator=generator).double() + 0.2
    errors = scale * draw[2][:, None] * torch.tensor([8.0, 3.0, 1.0])
    return Rounding(block, count, 100 * draw[0], 20 * draw[1], errors)


def objective(block: Rounding, bits: list[int]) -> float:
    """phi * w * eps^2, written out."""
    assert block.visits is not None
    assert block.probabilities is not None
    assert block.errors is not None
    total = 0.0
    for expert, own in enumerate(bits):
        phi = float(block.visits[expert] / block.visits.sum())
        w = float(block.probabilities[expert] / block.probabilities.sum())
        total += phi * w * float(block.errors[expert, own - 1]) ** 2
    return total


@pytest.mark.parametrize("bits", [1.375, 1.5, 1.57, 2.0, 2.54, 2.875])
def test_the_budget_and_the_floors_hold(bits: float) -> None:
    (found,) = method(bits=bits).allot([observed()])
    assert sum(found) <= bits * 8
    assert {2, 3} <= set(found)


@pytest.mark.parametrize("seed", range(5))
def test_no_uniform_or_frequency_plan_is_better(seed: int) -> None:
    block = observed(seed=seed)
    assert block.visits is not None
    order = block.visits.argsort(descending=True).tolist()
    free = method(bits=2.0, two_bits=0, three_bits=0).allot([block])[0]
    assert objective(block, free) <= objective(block, [2] * 8)
    with_floors = method(bits=2.0).allot([block])[0]
    by_frequency = [0] * 8
    for place, expert in enumerate(order):
        by_frequency[expert] = 3 if place < 3 else 2 if place < 5 else 1
    assert sum(by_frequency) == 16
    assert objective(block, with_floors) < objective(block, by_frequency)


def test_an_equal_budget_is_spent_to_the_last() -> None:
    errors = torch.tensor([[1.0, 2.0, 3.0]] * 8)  # rounding to more bits is worse
    block = Rounding(0, 8, torch.ones(8), torch.ones(8), errors)
    assert sum(method(bits=2.5, budget="equal").allot([block])[0]) == 20
    assert sum(method(bits=2.5).allot([block])[0]) == 11


def test_one_budget_for_the_whole_model_goes_where_it_matters() -> None:
    blocks = [observed(0, seed=1), observed(1, seed=1, scale=3.0)]
    apart = method(bits=2.0).allot(blocks)
    together = method(bits=2.0, scope="global").allot(blocks)
    assert [sum(bits) for bits in apart] == [16, 16]
    assert sum(map(sum, together)) <= 32
    assert sum(together[1]) > sum(together[0])
    losses = [
        sum(objective(b, own) for b, own in zip(blocks, plan, strict=True)) for plan in (together, apart)
    ]
    assert losses[0] < losses[1]


def test_exponents_are_used() -> None:
    block = observed(seed=2)
    assert block.errors is not None
    block.errors[6] *= 10
    (found,) = method(bits=1.5, alpha=0, beta=0, gamma=1).allot([block])
    assert found[6] == 3
    assert block.visits is not None
    block.visits[6] = 1e-4
    (found,) = method(bits=1.5, alpha=3, beta=0, gamma=1).allot([block])
    assert found[6] == 1


def test_an_unvisited_expert_gets_one_bit() -> None:
    block = observed()
    assert block.visits is not None
    block.visits[3] = 0
    assert method(bits=2.8).allot([block])[0][3] == 1


@pytest.mark.parametrize("scope", ["block", "global"])
def test_a_budget_below_the_floors_is_refused_with_the_least(scope: str) -> None:
    rooms = [Rounding(0, 8), Rounding(1, 8)]
    with pytest.raises(RecipeError, match=r"bits=1\.3.*1\.38 to 2\.88"):
        method(bits=1.3, scope=scope).allot(rooms)
    method(bits=1.375, scope=scope).allot(rooms)
    method(bits=1.0, scope=scope, two_bits=0, three_bits=0).allot(rooms)
    with pytest.raises(RecipeError, match=r"bits=3.*lower bits"):
        method(bits=3, budget="equal", scope=scope).allot(rooms)
    with pytest.raises(RecipeError, match="8 experts of block 0"):
        method(bits=2.5, two_bits=7, three_bits=2, scope=scope).allot(rooms)


@pytest.mark.parametrize("bits", [0.5, 3.5, "many"])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    with pytest.raises(RecipeError, match="bits"):
        method(bits=bits)


def test_uniform_bits_are_uniform() -> None:
    assert method("uniform-bits", bits=2).allot([Rounding(0, 4), Rounding(3, 2)]) == [[2] * 4, [2] * 2]
