"""Grids: closed forms, and what their codes mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantise.problems import draw
from secateur.core.errors import NumericsError
from secateur.quantise.grid import bits_a_weight, fit, rounded


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 70), st.integers(1, 40))
def test_one_bit_is_the_sign_times_the_mean_magnitude(seed: int, rows: int, columns: int, group: int) -> None:
    weight = draw((rows, columns), seed)
    new = rounded(weight, 1, group)
    for part, own in zip(weight.split(group, 1), new.split(group, 1), strict=True):
        mean = part.abs().mean(1, keepdim=True)
        torch.testing.assert_close(own, torch.where(part >= 0, mean, -mean), rtol=1e-3, atol=1e-6)
        error = (own - part).double().square().sum(1)
        closed = part.double().square().sum(1) - part.shape[1] * part.double().abs().mean(1).square()
        torch.testing.assert_close(error, closed, rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(1, 40))
def test_no_weight_is_further_than_half_a_step_from_its_point(
    seed: int, bits: int, columns: int, group: int
) -> None:
    weight = draw((3, columns), seed) + 0.3
    grid = fit(weight, bits, group)
    assert grid.scale.shape == (3, -(-columns // group))
    assert grid.scale.equal(grid.scale.half().float()), "codes are chosen for the scale that is stored"
    assert grid.low.equal(grid.low.half().float())
    codes = grid.codes(weight)
    assert int(codes.max()) < 2**bits
    step = grid.scale.repeat_interleave(group, 1)[:, :columns]
    assert bool(((grid.values(codes) - weight).abs() <= 0.5 * step + 0.004).all())


def test_ends_of_the_range_are_points_of_the_grid() -> None:
    weight = torch.tensor([[-1.5, 0.25, 0.0, 1.5, 4.0, 5.0]])
    new = rounded(weight, 2, 4)
    torch.testing.assert_close(new, torch.tensor([[-1.5, 0.5, 0.5, 1.5, 4.0, 5.0]]), atol=2e-3, rtol=0)


def test_a_constant_group_is_kept_exactly() -> None:
    for bits in (2, 3, 4):
        assert rounded(torch.full((2, 7), 0.75), bits, 4).equal(torch.full((2, 7), 0.75))
    assert rounded(torch.zeros(2, 7), 1, 4).abs().max() == 0


def test_the_search_lessens_the_error_it_looks_at() -> None:
    weight = draw((16, 256), 3)
    plain, searched = (rounded(weight, 3, 128, steps) - weight for steps in (0, 101))
    by_group = [(e.abs() ** 2.4).view(16, 2, 128).sum(2) for e in (searched, plain)]
    assert bool((by_group[0] <= by_group[1]).all())
    assert float(by_group[0].sum()) < 0.99 * float(by_group[1].sum())


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(NumericsError, match="float16"):
        fit(torch.tensor([[1e6, -1e6]]), 2, 128)


def test_bits_a_weight_with_metadata() -> None:
    assert bits_a_weight(2, 128, 256) == 2 + 2 * 16 / 128
    assert bits_a_weight(1, 128, 256) == 1 + 16 / 128
    assert bits_a_weight(3, 128, 130) == (8 * 49 + 2 * 2 * 16) / 130  # 390 bits are 49 bytes; two groups
