"""Allocations: the whole model keeps its sparsity, and who keeps more is who should."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import RecipeError
from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics
from secateur.weights.allocation import ALLOCATIONS, Allocation
from secateur.weights.allocation.alpha import AlphaPruning
from secateur.weights.allocation.base import rescaled, shifted, weighted_mean
from secateur.weights.allocation.owl import Owl
from secateur.weights.allocation.spectrum import tail_exponent
from secateur.weights.allocation.uniform import Uniform

from .problems import draw

KEYS = {"owl": "outliers", "alpha": "alpha", "uniform": "unused"}
blocks = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 10**9)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(found=blocks, sparsity=st.floats(0, 0.98), name=st.sampled_from(sorted(KEYS)))
def test_mean_over_parameters_is_what_was_asked(
    found: list[tuple[float, int]], sparsity: float, name: str
) -> None:
    measured = [{KEYS[name]: value} for value, _ in found]
    sizes = [size for _, size in found]
    result = ALLOCATIONS.get(name)().sparsities(measured, sizes, sparsity)
    assert len(result) == len(sizes)
    assert all(0 <= value < 1 for value in result)
    assert weighted_mean(result, sizes) == pytest.approx(sparsity, abs=1e-9)


@pytest.mark.parametrize("allocation", [Uniform(), Owl(lamb=0.0), AlphaPruning(eps=0.0)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_no_range_is_uniform_exactly(allocation: Allocation, sparsity: float) -> None:
    measured = [{"outliers": x, "alpha": x} for x in (1.0, 2.0, 5.0)]
    assert allocation.sparsities(measured, [10, 30, 7], sparsity) == [sparsity] * 3


def test_equal_blocks_are_uniform_exactly() -> None:
    for name in KEYS:
        measured = [{KEYS[name]: 3.3}] * 4
        assert ALLOCATIONS.get(name)().sparsities(measured, [1, 2, 3, 4], 0.7) == [0.7] * 4


def test_owl_by_hand() -> None:
    """Equal sizes: keep = r - mean(r) + (1 - p) with r in [0, 2 * lambda]."""
    measured = [{"outliers": x} for x in (1.0, 2.0, 5.0)]
    shares = [0.0, 0.04, 0.16]
    expected = [0.7 - share + sum(shares) / 3 for share in shares]
    assert Owl().sparsities(measured, [5, 5, 5], 0.7) == pytest.approx(expected)
    assert Owl(weighted=False).sparsities(measured, [1, 2, 9], 0.7) == pytest.approx(expected)
    assert max(expected) - min(expected) == pytest.approx(0.16)


def test_alpha_by_hand() -> None:
    """Equal sizes: ratios 0.7, 1.0, 1.3 of the sparsity; the largest exponent is pruned most."""
    measured = [{"alpha": x} for x in (2.0, 3.0, 4.0)]
    assert AlphaPruning().sparsities(measured, [5, 5, 5], 0.5) == pytest.approx([0.35, 0.5, 0.65])


def test_limits_hand_on_what_they_cut_off() -> None:
    result = rescaled([0.5, 1.0, 1.5], [1, 1, 1], 0.9)
    assert max(result) == 0.99
    assert sum(result) / 3 == pytest.approx(0.9)
    low = shifted([-1.0, 0.0, 0.1], [1, 1, 1], 0.1)
    assert low[0] == 0
    assert low[2] - low[1] == pytest.approx(0.1)


def test_owl_counts_outliers_over_the_whole_block() -> None:
    """One matrix of ones, one with loud inputs: the bar is M times the mean over both."""
    quiet = ("a", torch.ones(4, 8), observed(torch.ones(8)))
    loud = ("b", torch.ones(4, 8), observed(torch.tensor([100.0**2] + [1.0] * 7)))
    mean = (32 + 28 + 400) / 64
    assert Owl(M=100 / mean * 1.01).measure(0, [quiet, loud]) == {"outliers": 0}
    assert Owl(M=100 / mean * 0.99).measure(0, [quiet, loud]) == {"outliers": 100 * 4 / 64}


def observed(energies: torch.Tensor) -> InputStatistics:
    return InputStatistics(len(energies), tokens=1, sequences=1, second_moment=energies.double())


def test_what_is_measured_fits_into_json() -> None:
    matrices = [
        ("a", draw((12, 20), 0), observed(torch.ones(20))),
        ("b", draw((20, 12), 1), observed(torch.ones(12))),
    ]
    for _, entry in ALLOCATIONS:
        measured = entry().measure(3, matrices)
        assert json.loads(json.dumps(measured)) == measured


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.5])
def test_tail_exponent_of_a_known_power_law(exponent: float) -> None:
    """Singular values drawn so that the eigenvalues follow x^-exponent above 1."""
    uniform = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    eigenvalues = (1 - uniform) ** (-1 / (exponent - 1))
    left, right = (torch.linalg.qr(draw((600, 600), seed).double()).Q for seed in (0, 1))
    weight = left @ eigenvalues.sqrt().diag() @ right.T
    assert tail_exponent(weight) == pytest.approx(exponent, rel=0.05)
    assert tail_exponent(3.7 * weight.T) == pytest.approx(tail_exponent(weight), rel=0.05)


def test_tail_exponent_equals_a_plain_search() -> None:
    weight = draw((40, 60), 5) * torch.linspace(0.2, 3, 60)
    values = torch.linalg.svdvals(weight.double()).square().flip(0)
    decades = values.log10()
    peak = int(torch.histc(decades, 100, float(decades[0]), float(decades[-1])).argmax())
    mode = 10 ** float(decades[0] + peak * (decades[-1] - decades[0]) / 100)
    best, answer = 2.0, 0.0
    for i in range(39):
        if not 0.95 * mode <= values[i] <= 1.5 * mode:
            continue
        tail = values[i:]
        alpha = float(1 + len(tail) / (tail.log().sum() - len(tail) * tail[0].log()))
        fitted = 1 - (tail / tail[0]) ** (1 - alpha)
        distance = float((fitted - torch.arange(len(tail)) / len(tail)).abs().max())
        if distance < best:
            best, answer = distance, alpha
    assert tail_exponent(weight) == pytest.approx(answer, rel=1e-6)


def test_heavier_tails_keep_more() -> None:
    trained = draw((64, 64), 0) @ (torch.rand(64, generator=torch.Generator().manual_seed(1)) ** -1.0).diag()
    noise = draw((64, 64), 2)
    allocation = AlphaPruning()
    measured = [allocation.measure(i, [("w", weight, None)]) for i, weight in enumerate((trained, noise))]
    heavy, light = allocation.sparsities(measured, [1, 1], 0.5)
    assert heavy < light


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.ones(1, 6), torch.eye(5)])
def test_degenerate_spectra_have_an_exponent(weight: torch.Tensor) -> None:
    assert tail_exponent(weight) >= 1.0


def test_groups_refuse_all_but_uniform() -> None:
    pattern = Pattern.parse("2:4")
    Uniform().check_pattern(pattern)
    for name in ("owl", "alpha"):
        with pytest.raises(RecipeError, match=name):
            ALLOCATIONS.get(name)().check_pattern(pattern)
        ALLOCATIONS.get(name)().check_pattern(Pattern("row"))
