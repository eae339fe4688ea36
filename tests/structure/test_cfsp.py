"""CFSP: the algebra of its scores, and the sigmoid spread."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import producers, units_of
from secateur.core.statistics import InputStatistics
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import UnitProblem
from secateur.structure.cfsp import Cfsp

MODEL = tiny_model("llama", num_hidden_layers=4)
ANATOMY = resolve(MODEL.config)
SIZES = [block.size for block in ANATOMY.blocks]


def ffn_problem(scale: float = 1.0) -> UnitProblem:
    block = ANATOMY.blocks[0]
    parameters = dict(MODEL.get_submodule(block.prefix).state_dict())
    units = next(found for found in units_of(block) if found.kind == "ffn")
    weight = units.writer.view(parameters).float()
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(weight.shape[1], generator=generator).double()
    inputs = InputStatistics(weight.shape[1], 10, 1, second_moment=moments)
    rows = torch.linspace(1, scale, len(weight))[:, None]
    return UnitProblem("0.ffn", units, weight * rows, inputs, generator, producers(block, parameters, units))


def test_what_was_published_as_weight_aware_is_the_activation_norm() -> None:
    """Each term normalised along outputs and averaged along outputs is 1/d whatever the weights."""
    problem = ffn_problem()
    norms = problem.inputs.input_norms().double()
    published = torch.zeros(problem.units.count, dtype=torch.float64)
    for part in (problem.weight.abs() * norms, *(p.abs().T for p in problem.producers)):
        published += (part / part.sum(0)).mean(0) * norms
    activation = Cfsp.from_options({"fine": "activation"}).score(problem)
    torch.testing.assert_close(published, 3 / problem.weight.shape[0] * activation, rtol=1e-5, atol=1e-9)
    assert len(problem.producers) == 2


def test_relative_shares_do_not_see_the_scale_of_an_output_and_differ_from_norms() -> None:
    relative, activation = Cfsp(), Cfsp.from_options({"fine": "activation"})
    torch.testing.assert_close(relative.score(ffn_problem()), relative.score(ffn_problem(50.0)))
    a, b = relative.score(ffn_problem()), activation.score(ffn_problem())
    assert not torch.equal(a.argsort(), b.argsort())


def kept_of(angles: list[float], sparsity: float = 0.3, **options: object) -> list[int]:
    method = Cfsp.from_options(options)
    groups = [
        Scored(block.index, units, torch.arange(units.count).float())
        for block in ANATOMY.blocks
        for units in method.units(block)
    ]
    return [len(stays) for stays in allocate(groups, SIZES, sparsity, method, torch.tensor(angles))]


def test_blocks_that_turn_more_keep_more_and_the_budget_holds() -> None:
    kept = kept_of([0.4, 0.1, 0.2, 0.3])
    assert kept[0] > kept[3] > kept[2] > kept[1]
    units = next(found for found in units_of(ANATOMY.blocks[0]) if found.kind == "ffn")
    removed = sum(units.count - count for count in kept) * units.parameters
    assert removed == pytest.approx(0.3 * sum(SIZES), abs=2 * units.parameters)
    assert kept_of([0.3, 0.4, 0.1, 0.2]) == [kept[3], kept[0], kept[1], kept[2]]


def test_no_sharpness_or_no_difference_is_uniform() -> None:
    assert len(set(kept_of([0.4, 0.1, 0.2, 0.3], sharpness=0))) == 1
    assert len(set(kept_of([0.2] * 4))) == 1


def test_no_block_keeps_more_than_it_has() -> None:
    kept = kept_of([0.9, 0.01, 0.01, 0.01], sparsity=0.1)
    units = next(found for found in units_of(ANATOMY.blocks[0]) if found.kind == "ffn")
    assert max(kept) <= units.count
