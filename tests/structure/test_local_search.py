"""Swaps against brute force on problems small enough for it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import Units, units_of
from secateur.core.statistics import InputStatistics
from secateur.structure.base import UnitProblem
from secateur.structure.compensation import refit
from secateur.structure.local_search import improved

SIZES = {"ffn": {"intermediate_size": 7}, "kv_groups": {"num_key_value_heads": 8, "num_attention_heads": 8}}


def problem_of(kind: str, seed: int) -> UnitProblem:
    """Inputs that depend on each other, so that the greedy choice is not the best."""
    blocks = resolve(tiny_model("llama", **SIZES[kind]).config).blocks
    units: Units = next(units for units in units_of(blocks[0]) if units.kind == kind)
    generator = torch.Generator().manual_seed(seed)
    columns = units.writer.shape[1]
    mixed = torch.randn(columns, columns, generator=generator) + 0.3
    inputs = (torch.randn(300, columns, generator=generator) @ mixed).double()
    statistics = InputStatistics(columns, 300, 4, hessian=(inputs.T @ inputs).float())
    weight = torch.randn(units.writer.shape, generator=generator)
    return UnitProblem("0.x", units, weight, statistics, generator)


def loss(problem: UnitProblem, kept: Tensor) -> float:
    hessian = problem.inputs.hessian
    assert hessian is not None
    new, _ = refit(problem.weight, hessian, problem.units.columns(kept))
    change = (problem.weight - new).double()
    return float(((change @ hessian.double()) * change).sum()) / 2


@pytest.mark.parametrize("kind", SIZES)
def test_no_start_ends_worse(kind: str) -> None:
    problem = problem_of(kind, 0)
    starts = [torch.tensor(chosen) for chosen in combinations(range(problem.units.count), 4)]
    before = [loss(problem, kept) for kept in starts]
    after = [loss(problem, improved(problem, kept, swaps=2, rounds=20)) for kept in starts]
    assert all(end <= start * (1 + 1e-6) for start, end in zip(before, after, strict=True))
    assert min(after) == pytest.approx(min(before), rel=1e-6)
    assert sum(after) < 0.9 * sum(before)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_one_swap_is_that_of_brute_force(kind: str, seed: int) -> None:
    problem = problem_of(kind, seed)
    kept = torch.arange(4)

    def lowest(sets: list[Tensor]) -> Tensor:
        return min(sets, key=lambda units: loss(problem, units))

    rest = lowest([kept[kept != unit] for unit in kept])
    others = problem.units.others(rest)
    best = lowest([torch.cat([rest, other[None]]).sort().values for other in others])
    found = improved(problem, kept, swaps=1, rounds=1)
    assert found.tolist() == best.tolist()


def test_one_round_drops_the_cheapest_and_takes_back_the_dearest() -> None:
    """A unit that was dropped although it carries everything comes back at once."""
    problem = problem_of("ffn", 0)
    assert problem.inputs.hessian is not None
    problem.weight[:, 3] *= 100
    found = improved(problem, torch.tensor([0, 1, 2]), swaps=1, rounds=1)
    assert 3 in found.tolist()


def test_all_or_one_unit_has_nothing_to_swap() -> None:
    problem = problem_of("ffn", 0)
    for kept in (torch.arange(problem.units.count), torch.tensor([2])):
        assert torch.equal(improved(problem, kept, swaps=5, rounds=5), kept)
