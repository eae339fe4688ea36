"""Greedy elimination against brute force, and the two cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import Units, units_of
from secateur.core.statistics import InputStatistics
from secateur.structure.base import UnitProblem
from secateur.structure.compensation import refit
from secateur.structure.elimination import eliminate
from secateur.structure.tyr import Tyr

BLOCK = resolve(tiny_model("llama", intermediate_size=12).config).blocks[0]
UNITS = {units.kind: units for units in units_of(BLOCK)}
DAMPING = 1e-9


def drawn(units: Units, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    width = units.writer.shape[1]
    inputs = torch.randn(300, width, generator=generator).double()
    inputs = inputs @ (torch.eye(width) + 0.15 * torch.randn(width, width, generator=generator)).double()
    return torch.randn(units.writer.shape, generator=generator), (inputs.T @ inputs).float()


def lost(weight: Tensor, hessian: Tensor, kept: Tensor) -> float:
    """1/2 of the squared error that is left when the kept columns are fitted exactly."""
    exact, full = hessian.double(), weight.double()
    solved = torch.linalg.lstsq(exact[kept][:, kept], exact[kept] @ full.T).solution
    change = full.clone()
    change[:, kept] -= solved.T
    return 0.5 * float(((change @ exact) * change).sum())


@pytest.mark.parametrize("kind", ["ffn", "kv_groups"])
def test_one_at_a_time_is_the_greedy_search_by_brute_force(kind: str) -> None:
    units = UNITS[kind]
    weight, hessian = drawn(units)
    found = eliminate(weight, hessian, units, rounds=units.count, damping=DAMPING)
    gone: list[int] = []
    for unit in found.order[:-1].tolist():
        left = [other for other in range(units.count) if other not in gone]
        losses = {
            other: lost(weight, hessian, units.columns(units.others(torch.tensor([*gone, other]))))
            for other in left
        }
        assert losses[unit] == pytest.approx(min(losses.values()), rel=1e-4)
        assert float(found.losses[unit]) == pytest.approx(losses[unit], rel=1e-4)
        gone.append(unit)
    assert sorted(found.order.tolist()) == list(range(units.count))


def test_losses_rise_in_the_order_of_elimination() -> None:
    weight, hessian = drawn(UNITS["ffn"])
    for rounds in (1, 3, 100):
        found = eliminate(weight, hessian, UNITS["ffn"], rounds=rounds, damping=DAMPING)
        assert (found.losses[found.order].diff() >= 0).all()


def test_one_of_two_equal_channels_is_free_and_the_other_takes_both_parts() -> None:
    units = UNITS["ffn"]
    weight, hessian = drawn(units)
    hessian[3], hessian[:, 3] = hessian[7].clone(), hessian[:, 7].clone()
    hessian[3, 3] = hessian[7, 7]
    weight[:, 3] = weight[:, 7]
    found = eliminate(weight, hessian, units, rounds=100, damping=DAMPING)
    first = int(found.order[0])
    assert first in (3, 7)
    assert float(found.losses[first]) < 1e-4 * float(found.losses.median())
    kept = units.columns(units.others(torch.tensor([first])))
    new, _ = refit(weight, hessian, kept)
    torch.testing.assert_close(new[:, 10 - first], 2 * weight[:, 7], rtol=1e-2, atol=1e-2)


def test_without_correlations_the_cheapest_channel_is_the_one_of_least_energy() -> None:
    units = UNITS["ffn"]
    weight, _ = drawn(units)
    energy = torch.rand(units.count, generator=torch.Generator().manual_seed(3)) + 0.1
    found = eliminate(weight, torch.diag(energy), units, rounds=100, damping=0.0)
    expected = (weight.double().square().sum(0) * energy.double()).argsort()
    assert torch.equal(found.order, expected)
    with_energy = eliminate(
        weight, torch.diag(energy), units, rounds=100, damping=0.0, first_order_weight=1.0
    )
    assert torch.equal(with_energy.order, expected)  # W_j . G_j is then twice the loss
    torch.testing.assert_close(with_energy.losses, found.losses)


def test_the_first_order_term_is_the_share_of_the_output() -> None:
    """With a weight that drowns the loss, the first to go has the smallest W_j . (H W)_j."""
    units = UNITS["ffn"]
    weight, hessian = drawn(units)
    share = ((hessian.double() @ weight.double().T) * weight.double().T).sum(1)
    options = {"first_order_weight": 1e9, "damping": 1e-9, "rounds": 1000}
    statistics = InputStatistics(units.count, 300, 3, hessian=hessian)
    problem = UnitProblem("0.ffn", units, weight, statistics, torch.Generator())
    scores = Tyr.from_options(options).score(problem)
    assert int(scores.argmin()) == int(share.argmin())
    assert int(scores.argmin()) != int(Tyr().score(problem).argmin())
    assert sorted(scores.tolist()) == list(range(units.count))
