"""Closed forms of the scores, and what FLAP's bias is worth."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import Units, units_of
from secateur.core.statistics import InputStatistics
from secateur.structure.base import UnitProblem
from secateur.structure.compensation import mean_bias, refit
from secateur.structure.elimination import eliminate
from secateur.structure.flap import Flap
from secateur.structure.magnitude_structure import MagnitudeStructure
from secateur.structure.osscar import Osscar
from secateur.structure.random_structure import RandomStructure
from secateur.structure.wanda_structure import WandaStructure

UNITS = {units.kind: units for units in units_of(resolve(tiny_model("llama").config).blocks[0])}


def problem_of(units: Units, inputs: Tensor, seed: int = 0) -> UnitProblem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(units.writer.shape, generator=generator)
    exact = inputs.double()
    statistics = InputStatistics(
        inputs.shape[1],
        len(inputs),
        4,
        second_moment=exact.square().sum(0),
        mean=exact.sum(0),
        hessian=(exact.T @ exact).float(),
    )
    return UnitProblem("0.x", units, weight, statistics, generator)


@pytest.fixture(params=["ffn", "kv_groups"])
def problem(request: pytest.FixtureRequest) -> UnitProblem:
    units = UNITS[request.param]
    generator = torch.Generator().manual_seed(1)
    return problem_of(units, torch.randn(200, units.writer.shape[1], generator=generator) + 0.5)


def test_scores_are_sums_over_the_columns_of_a_unit(problem: UnitProblem) -> None:
    norms = (problem.inputs.second_moment / 4).sqrt().float()
    wanda = (problem.weight.abs() * norms).mean(0)
    magnitude = problem.weight.square().sum(0).sqrt()
    for unit in range(problem.units.count):
        columns = problem.units.columns(torch.tensor([unit]))
        assert WandaStructure().score(problem)[unit] == pytest.approx(float(wanda[columns].sum()), rel=1e-5)
        found = MagnitudeStructure().score(problem)[unit]
        assert found == pytest.approx(float(magnitude[columns].sum()), rel=1e-5)


def test_random_depends_on_the_generator_alone(problem: UnitProblem) -> None:
    again = problem_of(problem.units, torch.zeros(2, problem.weight.shape[1]))
    problem.generator.manual_seed(7)
    again.generator.manual_seed(7)
    assert torch.equal(RandomStructure().score(problem), RandomStructure().score(again))


def test_the_loss_after_compensation_is_the_covariance_form() -> None:
    """E||W_D (x_D - mu_D)||^2 = tr(W_D Cov_DD W_D^T); without the bias ||W_D mu_D||^2 more (flap, 2.2)."""
    units = UNITS["ffn"]
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(500, units.writer.shape[1], generator=generator).double() * 2 + 1
    problem = problem_of(units, inputs)
    removed = torch.tensor([3, 5, 40])
    part, weight = inputs[:, removed], problem.weight[:, removed].double()
    written = part @ weight.T
    assert problem.inputs.mean is not None
    bias = mean_bias(problem.weight, problem.inputs.mean / len(inputs), removed)
    covariance = torch.cov(part.T, correction=0)
    expected = float(torch.trace(weight @ covariance @ weight.T))
    with_bias = float((written - bias.double()).square().sum(1).mean())
    without = float(written.square().sum(1).mean())
    assert with_bias == pytest.approx(expected, rel=1e-5)
    mean = weight @ part.mean(0)
    assert without - with_bias == pytest.approx(float(mean.square().sum()), rel=1e-5)


def test_a_constant_channel_goes_first_and_only_for_flap() -> None:
    units = UNITS["ffn"]
    inputs = torch.randn(300, units.writer.shape[1], generator=torch.Generator().manual_seed(3))
    inputs[:, 7] = 100.0
    problem = problem_of(units, inputs)
    assert int(Flap().score(problem).argmin()) == 7
    assert int(WandaStructure().score(problem).argmax()) == 7


def test_a_shift_changes_wifn_and_not_wifv() -> None:
    units = UNITS["ffn"]
    inputs = torch.randn(300, units.writer.shape[1], generator=torch.Generator().manual_seed(4))
    plain, shifted = problem_of(units, inputs), problem_of(units, inputs + 3)
    torch.testing.assert_close(Flap().score(plain), Flap().score(shifted), rtol=1e-4, atol=1e-5)
    wifn = Flap.from_options({"metric": "wifn"})
    assert not torch.allclose(wifn.score(plain), wifn.score(shifted), rtol=1e-2)


def test_ranks_order_units_alike_within_a_block_and_loss_is_what_bias_leaves(problem: UnitProblem) -> None:
    """The loss is the diagonal of tr(W_D Cov_DD W_D^T), a parameter (flap, section 2.2)."""
    plain, logs, loss = (
        Flap.from_options({"rank": rank}).score(problem) for rank in ("zscore", "log", "loss")
    )
    assert torch.equal(plain.argsort(), logs.argsort())
    assert torch.equal(plain.argsort(), loss.argsort())
    assert problem.inputs.second_moment is not None
    assert problem.inputs.mean is not None
    mean = problem.inputs.mean / 200
    variance = (problem.inputs.second_moment / 200 - mean.square()) * 200 / 199
    columns = problem.units.columns(torch.tensor([1]))
    whole = (problem.weight[:, columns].double().square().sum(0) * variance[columns]).sum()
    assert float(loss[1]) == pytest.approx(float(whole) / problem.units.parameters, rel=1e-6)


def lost(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = (weight - new).double()
    return float(((change @ hessian.double()) * change).sum()) / 2


def test_refitting_is_the_normal_equations_and_never_worse(problem: UnitProblem) -> None:
    hessian = problem.inputs.hessian
    assert hessian is not None
    kept = problem.units.columns(torch.arange(1, problem.units.count))
    new, _ = refit(problem.weight, hessian, kept)
    silenced = torch.zeros_like(new)
    silenced[:, kept] = problem.weight[:, kept]
    assert lost(problem.weight, new, hessian) <= lost(problem.weight, silenced, hessian)
    residual = ((problem.weight - new).double() @ hessian.double())[:, kept]
    assert residual.abs().max() < 1e-3 * float(hessian.diagonal().max())


def test_osscar_removes_nested_sets_and_costs_only_grow(problem: UnitProblem) -> None:
    scores = Osscar.from_options({"rounds": 5}).score(problem)
    assert problem.inputs.hessian is not None
    expected = eliminate(problem.weight, problem.inputs.hessian, problem.units, rounds=5, damping=1e-2)
    assert torch.equal(scores, expected.losses)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
    assert len(scores.unique()) == problem.units.count
