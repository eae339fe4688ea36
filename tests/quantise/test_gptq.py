"""GPTQ against the published procedure, and against rounding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantise.problems import draw, layer_loss, observed
from secateur.core.numerics import damped_cholesky
from secateur.core.statistics import InputStatistics
from secateur.quantise.gptq import gptq, round_to_nearest
from secateur.quantise.grid import fit


def published(weight: Tensor, inputs: InputStatistics, bits: int, group: int, damping: float) -> Tensor:
    """Column by column: invert, factor the inverse, push the error to the right."""
    assert inputs.hessian is not None
    lower, _ = damped_cholesky(inputs.hessian.double(), damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    left, new = weight.double().clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % group == 0:
            grid = fit(left[:, column : column + group].float(), bits, group)
        new[:, column] = grid.values(grid.codes(left[:, column : column + 1].float()))[:, 0]
        error = (left[:, column] - new[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return new


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("columns", "group"), [(48, 16), (200, 128), (70, 100), (160, 40)])
def test_it_is_the_published_procedure(bits: int, columns: int, group: int) -> None:
    weight, inputs = draw((9, columns), bits), observed(columns, 4 * columns, 5)
    found = gptq(weight, inputs, bits, group=group, steps=0)
    expected = published(weight, inputs, bits, group, 0.01)
    # a weight halfway between two points may fall either way, and what follows it in its row too
    same = (found.weight - expected).abs().amax(1) < 1e-3
    assert float(same.float().mean()) > 0.7
    assert layer_loss(weight, found.weight, inputs) == pytest.approx(
        layer_loss(weight, expected, inputs), rel=0.02
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [0, 21])
def test_it_loses_less_than_rounding_alone(bits: int, steps: int) -> None:
    for seed in range(3):
        weight, inputs = draw((24, 96), seed), observed(96, 400, seed + 20)
        plain = round_to_nearest(weight, bits, group=32, steps=steps)
        better = gptq(weight, inputs, bits, group=32, steps=steps)
        losses = [layer_loss(weight, one.weight, inputs) for one in (better, plain)]
        assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_compensation_inside_a_group_counts(bits: int) -> None:
    """One group wide: without it the whole matrix would be rounded alone."""
    weight, inputs = draw((24, 64), 1), observed(64, 300, 2)
    found = gptq(weight, inputs, bits, group=64, steps=0)
    grid = fit(weight, bits, 64)
    alone = grid.values(grid.codes(weight))
    assert layer_loss(weight, found.weight, inputs) < 0.9 * layer_loss(weight, alone, inputs)


def test_more_bits_lose_less() -> None:
    weight, inputs = draw((24, 64), 1), observed(64, 300, 2)
    losses = [layer_loss(weight, gptq(weight, inputs, bits).weight, inputs) for bits in (1, 2, 3, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3 * losses[0]


def test_rows_do_not_see_each_other() -> None:
    weight, inputs = draw((12, 40), 1), observed(40, 200, 2)
    whole = gptq(weight, inputs, 2, group=16)
    part = gptq(weight[4:8], inputs, 2, group=16)
    assert whole.rows(4, 8).weight.equal(part.weight)


def test_inputs_that_were_never_active_are_rounded() -> None:
    weight, inputs = draw((6, 32), 1), observed(32, 200, 2)
    assert inputs.hessian is not None
    inputs.hessian[:, 5] = inputs.hessian[5] = 0
    found = gptq(weight, inputs, 4)
    assert float((found.weight[:, 5] - weight[:, 5]).abs().max()) < 0.5
