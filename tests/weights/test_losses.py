"""The relative error of a matrix output, from the inputs themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.core.statistics import InputStatistics
from secateur.weights.losses import reconstruction_loss

from .problems import correlated_inputs, draw, observe

INPUTS = correlated_inputs(16, 100, 0)
WEIGHT, NEW = draw((12, 16), 1), draw((12, 16), 2)


def test_with_the_hessian_it_is_the_error_of_the_output() -> None:
    expected = ((NEW - WEIGHT) @ INPUTS.T).square().sum() / (WEIGHT @ INPUTS.T).square().sum()
    assert reconstruction_loss(WEIGHT, NEW, observe(INPUTS)) == pytest.approx(float(expected), rel=1e-4)


def test_without_it_the_inputs_count_as_independent() -> None:
    statistics = replace(observe(INPUTS), hessian=None)
    energies = INPUTS.square().sum(0)
    expected = ((NEW - WEIGHT).square() @ energies).sum() / (WEIGHT.square() @ energies).sum()
    assert reconstruction_loss(WEIGHT, NEW, statistics) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("hessian", [True, False])
def test_known_values(hessian: bool) -> None:
    statistics = observe(INPUTS) if hessian else replace(observe(INPUTS), hessian=None)
    assert reconstruction_loss(WEIGHT, WEIGHT, statistics) == 0
    assert reconstruction_loss(WEIGHT, 0 * WEIGHT, statistics) == pytest.approx(1)
    assert reconstruction_loss(WEIGHT, 0.9 * WEIGHT, statistics) == pytest.approx(0.01, rel=1e-3)


def test_a_sample_of_rows_is_the_loss_of_those_rows() -> None:
    statistics = observe(INPUTS)
    assert reconstruction_loss(WEIGHT, NEW, statistics, rows=4) == pytest.approx(
        reconstruction_loss(WEIGHT[::3], NEW[::3], statistics)
    )
    assert reconstruction_loss(WEIGHT, NEW, statistics, rows=12) == reconstruction_loss(
        WEIGHT, NEW, statistics
    )


def test_matrices_in_a_batch_count_together() -> None:
    statistics = observe(INPUTS)
    stacked = reconstruction_loss(WEIGHT.view(3, 4, 16), NEW.view(3, 4, 16), statistics)
    assert stacked == pytest.approx(reconstruction_loss(WEIGHT, NEW, statistics))


def test_nothing_observed_or_nothing_there() -> None:
    assert reconstruction_loss(WEIGHT, NEW, InputStatistics(columns=16)) is None
    silent = InputStatistics(columns=16, second_moment=torch.zeros(16, dtype=torch.float64))
    assert reconstruction_loss(WEIGHT, NEW, silent) is None
