"""What every method of the catalogue promises, whatever it does inside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, methods_of
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern, drop_count
from secateur.core.statistics import InputStatistics
from secateur.weights.base import Problem, Solution, WeightMethod

from .problems import make_problem

PATTERNS = ["row", "matrix", "2:4", "4:8", "1:4"]
OPTIONS = {"armor": {"iterations": 4}}


def made(method: str) -> WeightMethod:
    return METHODS.get(method)(**OPTIONS.get(method, {}))


def pruned(method: str, pattern: str, sparsity: float = 0.6, **changes: object) -> tuple[Problem, Solution]:
    problem = replace(make_problem(24, 64, pattern=pattern, sparsity=sparsity, seed=5), **changes)
    return problem, made(method).prune(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", methods_of("weights"))
def test_contract(method: str, pattern: str, dtype: torch.dtype) -> None:
    weight = make_problem(24, 64, seed=5).weight.to(dtype).float()
    problem, solution = pruned(method, pattern, weight=weight)
    assert torch.equal(problem.weight, make_problem(24, 64, seed=5).weight.to(dtype).float())
    assert solution.weight.dtype == torch.float32
    assert solution.weight.isfinite().all()
    sparse = solution.weight if METHODS.get(method).leaves_zeros else weight * solution.kept
    assert torch.equal(sparse[~solution.kept], torch.zeros(int((~solution.kept).sum())))
    if METHODS.get(method).leaves_zeros:
        assert not torch.signbit(sparse[~solution.kept]).any(), "a dropped weight is plus zero"
    assert check_pattern(sparse.to(dtype), problem.pattern, problem.sparsity) == 0
    expected = (
        round(weight.numel() * problem.sparsity)
        if problem.pattern.kind == "n:m"
        else drop_count(weight.numel(), problem.sparsity)
        if problem.pattern.kind == "matrix"
        else 24 * drop_count(64, problem.sparsity)
    )
    assert int((~solution.kept).sum()) == expected
    assert all(isinstance(note, float) for note in solution.notes.values())


@pytest.mark.parametrize("pattern", ["row", "2:4"])
@pytest.mark.parametrize("method", methods_of("weights"))
def test_the_same_problem_has_the_same_solution(method: str, pattern: str) -> None:
    first, second = pruned(method, pattern)[1], pruned(method, pattern)[1]
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("pattern", ["row", "matrix"])
@pytest.mark.parametrize("method", methods_of("weights"))
def test_nothing_to_remove_changes_nothing(method: str, pattern: str) -> None:
    problem, solution = pruned(method, pattern, sparsity=0.0)
    assert torch.equal(solution.weight, problem.weight)
    assert solution.kept.all()


@pytest.mark.parametrize("method", methods_of("weights"))
def test_facts_for_the_catalogue(method: str) -> None:
    entry = METHODS.get(method)
    assert entry.id == method
    assert entry.family == "weights"
    assert entry.__doc__
    assert all(field.description for field in entry.model_fields.values())
    assert entry().statistics <= {"second_moment", "mean", "hessian", "gradient"}
    if entry.needs:
        assert entry.paper is not None
        assert 2015 <= entry.paper.year <= 2026


@pytest.mark.parametrize("pattern", ["row", "2:4"])
@pytest.mark.parametrize("method", methods_of("weights"))
def test_the_statistics_it_names_are_enough(method: str, pattern: str) -> None:
    problem = make_problem(8, 16, pattern=pattern)
    named = METHODS.get(method)().statistics
    full = problem.inputs
    problem.inputs = InputStatistics(
        columns=full.columns,
        tokens=full.tokens,
        sequences=full.sequences,
        second_moment=full.second_moment if "second_moment" in named else None,
        mean=full.mean if "mean" in named else None,
        hessian=full.hessian if "hessian" in named else None,
    )
    if "gradient" not in named:
        problem.gradient = None
    assert made(method).prune(problem).kept.float().mean() == 0.5


@pytest.mark.parametrize("method", methods_of("weights"))
def test_inputs_that_were_always_zero_do_not_decide_by_position(method: str) -> None:
    """Their weights compete among each other by magnitude; nothing becomes undefined."""
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    inputs[:, 4:] = 0
    problem = make_problem(8, 16, sparsity=0.5, inputs=inputs)
    solution = made(method).prune(problem)
    assert solution.weight.isfinite().all()
    if method in ("wanda", "dsnot"):
        assert solution.kept[:, :4].all()
        dead = problem.weight[:, 4:].abs()
        assert torch.equal(solution.kept[:, 4:], dead >= dead.topk(4, dim=1).values[:, -1:])


@pytest.mark.parametrize("options", [{"base": "wnda"}, {"base": ""}, {"cycels": 3}])
def test_options_are_checked_by_name(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"base|cycles"):
        METHODS.get("dsnot").from_options(options)


def test_a_method_without_scores_says_so() -> None:
    with pytest.raises(RecipeError, match="alps"):
        METHODS.get("alps")().score(make_problem())


@pytest.mark.parametrize("method", ["sparsegpt", "dsnot", "wanda"])
def test_scores_serve_a_choice_across_matrices(method: str) -> None:
    problem = make_problem(8, 16, pattern="matrix")
    scores = METHODS.get(method)().score(problem)
    assert scores.shape == problem.weight.shape
    assert (scores >= 0).all()


def test_unstructured_means_the_published_group() -> None:
    groups = {
        name: str(Pattern("unstructured").resolve(entry.default_pattern))
        for name in methods_of("weights")
        if (entry := METHODS.get(name))
    }
    assert groups["wanda"] == groups["gblm"] == groups["dsnot"] == "row"
    assert (
        groups["magnitude"]
        == groups["ria"]
        == groups["sparsegpt"]
        == groups["alps"]
        == groups["nowag-p"]
        == "matrix"
    )
