"""The low-rank control of `benchmarks/armor.py`, which ARMOR is judged by."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from secateur.core.method import METHODS
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern
from secateur.core.statistics import InputStatistics
from secateur.weights.base import Problem
from secateur.weights.nowag import normalise
from secateur.weights.nowag_p import NowagP

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (BENCHMARKS / "armor.py").is_file():
        pytest.skip("the benchmarks are not part of this copy")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("armor")


def problem(pattern: str = "2:4") -> Problem:
    draw = torch.Generator().manual_seed(0)
    moments = torch.randn(32, generator=draw, dtype=torch.float64).exp()
    inputs = InputStatistics(32, tokens=1, sequences=1, second_moment=moments)
    return Problem("w", torch.randn(48, 32, generator=draw), inputs, Pattern.parse(pattern), 0.5)


def error(bench: ModuleType, one: Problem, weight: torch.Tensor) -> float:
    return bench._error(weight, normalise(one.weight, one.inputs))


@pytest.mark.parametrize("block", [4, 16])
def test_one_round_is_nowag_p_and_the_best_of_that_rank(bench: ModuleType, block: int) -> None:
    """The error is that of the singular values left over (Eckart and Young)."""
    one = problem()
    whole = normalise(one.weight, one.inputs)
    missing = (whole.matrix * ~NowagP().prune(one).kept).double() * whole.energy.double().sqrt()
    values = torch.linalg.svdvals(missing).square()
    total = (whole.matrix.double().square() * whole.energy).sum()
    solution = bench.LowRank(block=block, overhead=99).prune(one)
    assert error(bench, one, solution.weight) == pytest.approx(float(values[block:].sum() / total), rel=1e-4)
    assert solution.notes["extra"] == block * (48 + 32) / (48 * 32), "as many numbers as blocks of that size"


@pytest.mark.parametrize("pattern", ["2:4", "matrix"])
def test_more_rounds_never_lose(bench: ModuleType, pattern: str) -> None:
    one = problem(pattern)
    solutions = [bench.LowRank(block=8, overhead=99, rounds=rounds).prune(one) for rounds in (1, 2, 8, 30)]
    errors = [error(bench, one, solution.weight) for solution in solutions]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    assert int(solutions[-1].kept.sum()) == one.weight.numel() // 2
    if pattern == "2:4":
        assert check_pattern(solutions[-1].kept, one.pattern) == 0


def test_a_judged_method_notes_its_error_beside_that_of_nowag_p(bench: ModuleType) -> None:
    one, kept = problem(), dict(METHODS._entries)
    try:
        found = {
            name: METHODS.get(bench.judged(name))().prune(one).notes for name in ("nowag-p", "magnitude")
        }
    finally:
        METHODS._entries.clear()
        METHODS._entries.update(kept)
    assert found["nowag-p"]["error"] == found["nowag-p"]["nowag"] == found["magnitude"]["nowag"]
    assert found["magnitude"]["error"] > found["magnitude"]["nowag"]
