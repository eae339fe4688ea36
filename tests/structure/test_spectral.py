"""Spectra and their distances against scipy and the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, wasserstein_distance

from secateur.structure.spectral import ks_distance, singular_values, wasserstein


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(2, 30), st.booleans())
def test_distances_are_those_of_scipy(seed: int, n: int, m: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(2, size, generator=generator).double() * 3 for size in (n, m))
    if ties:
        a, b = a.round(), b.round()
    a, b = a.sort(-1).values, b.sort(-1).values
    for row in range(2):
        ks = ks_2samp(a[row].numpy(), b[row].numpy()).statistic
        assert float(ks_distance(a, b)[row]) == pytest.approx(ks, abs=1e-6)
        expected = wasserstein_distance(a[row].numpy(), b[row].numpy())
        assert float(wasserstein(a, b)[row]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 16, 40), (3, 8, 8)])
def test_gram_matrices_give_the_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.svdvals(matrices).flip(-1)
    torch.testing.assert_close(singular_values(matrices), expected, rtol=1e-6, atol=1e-6)


def test_fewer_rows_only_shrink_singular_values() -> None:
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    assert (singular_values(matrix[:25]) <= singular_values(matrix) + 1e-9).all()


def test_rows_of_zeros_are_not_missed() -> None:
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    matrix[30:] = 0
    assert float(ks_distance(singular_values(matrix), singular_values(matrix[:30]))) == 0
    assert float(ks_distance(singular_values(matrix), singular_values(matrix[10:]))) > 0
