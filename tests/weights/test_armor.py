"""ARMOR: each step against its closed form, the loss that never rises, and the product that is written."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern, drop_count, select
from secateur.weights.armor import Armor
from secateur.weights.armor_core import CoreStep
from secateur.weights.armor_steps import STEPS, Factors, block_sizes, closed_form
from secateur.weights.base import Problem
from secateur.weights.nowag import Normalised, normalise
from secateur.weights.nowag_p import NowagP

from .problems import draw, make_problem

PATTERNS = ["2:4", "4:8", "8:16", "row", "matrix"]


def heavy(rows: int = 16, columns: int = 32, *, pattern: str = "2:4", seed: int = 0) -> Problem:
    """A matrix with a few large entries, and inputs of very different energies."""
    problem = make_problem(rows, columns, pattern=pattern, seed=seed)
    problem.weight = draw((rows, columns), seed) * draw((rows, columns), seed + 1).exp()
    problem.inputs.second_moment = draw((columns,), seed + 2).exp().double() * 100
    return problem


def started(problem: Problem, a: int = 8, b: int = 8, *, moved: float = 0.3) -> tuple[Factors, Normalised]:
    """Factors some way off their start, so that nothing is an identity by accident."""
    whole = normalise(problem.weight, problem.inputs)
    kept = select(whole.importance(), problem.pattern, problem.sparsity)
    factors = Factors.start(whole.matrix, kept, a, b)
    factors.left += moved * draw(tuple(factors.left.shape), 31) / a
    factors.right += moved * draw(tuple(factors.right.shape), 32) / b
    return factors, whole


def written_out(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks)


def squared_error(factors: Factors, whole: Normalised) -> float:
    product = written_out(factors.left).double() @ factors.core.double() @ written_out(factors.right).double()
    return float(((whole.matrix - product).square() * whole.energy).sum())


def core_step(problem: Problem, select: str = "gradient") -> CoreStep:
    return CoreStep(problem.pattern, select, problem.generator)


def test_start_is_nowag_p() -> None:
    problem = heavy()
    whole = normalise(problem.weight, problem.inputs)
    factors, _ = started(problem, moved=0)
    pruned = NowagP().prune(problem).weight
    torch.testing.assert_close(whole.restored(factors.product()), pruned)
    lost = ((~NowagP().prune(problem).kept) * whole.importance()).sum() / whole.importance().sum()
    assert factors.loss(whole) == pytest.approx(float(lost), rel=1e-6)
    assert Armor(block=8).prune(problem).notes["proxy_first"] == pytest.approx(float(lost), rel=1e-6)


def test_the_product_is_that_of_the_matrices_written_out() -> None:
    factors, whole = started(heavy(), 4, 16)
    expected = written_out(factors.left) @ factors.core @ written_out(factors.right)
    torch.testing.assert_close(factors.product(), expected)
    total = float((whole.matrix.square() * whole.energy).sum())
    assert factors.loss(whole) == pytest.approx(squared_error(factors, whole) / total, rel=1e-5)


def test_scales_are_folded_into_rows_of_a_and_columns_of_b() -> None:
    problem = heavy()
    factors, whole = started(problem, 4, 8)
    left = whole.rows[:, None] * written_out(factors.left)
    right = written_out(factors.right) * whole.columns
    torch.testing.assert_close(whole.restored(factors.product()), left @ factors.core @ right)


def test_closed_form_of_a_and_b_is_least_squares() -> None:
    factors, whole = started(heavy(16, 32), 4, 8)
    scale = whole.energy.double().sqrt()
    inner = (factors.core @ written_out(factors.right)).double() * scale
    expected = [
        torch.linalg.lstsq(inner[rows].T, (whole.matrix[rows].double() * scale).T).solution.T
        for rows in torch.arange(16).view(4, 4)
    ]
    closed_form(factors, whole)
    torch.testing.assert_close(factors.left.double(), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_closed_form_of_b_is_least_squares_given_a() -> None:
    factors, whole = started(heavy(32, 16), 4, 4)
    core = factors.core.clone()
    closed_form(factors, whole)
    outer = (written_out(factors.left) @ core).double()
    for block, columns in enumerate(torch.arange(16).view(4, 4)):
        expected = torch.linalg.lstsq(outer[:, columns], whole.matrix[:, columns].double()).solution
        torch.testing.assert_close(factors.right[block].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["als", "gd"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_als_and_gradient_descent_never_rise(name: str, pattern: str) -> None:
    problem = heavy(64, 32, pattern=pattern)
    factors, whole = started(problem, 8, 16)
    step, core = STEPS[name](0.0), core_step(problem)
    losses = [factors.loss(whole)]
    for _ in range(15):
        step(factors, whole)
        losses.append(factors.loss(whole))
        core(factors, whole, 2)
        losses.append(factors.loss(whole))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert not factors.core[~factors.kept].any()


def test_adam_follows_the_gradient_of_the_loss() -> None:
    problem = heavy()
    factors, whole = started(problem)
    free = [tensor.clone().requires_grad_() for tensor in (factors.left, factors.core, factors.right)]
    product = torch.block_diag(*free[0]) @ (free[1] * factors.kept) @ torch.block_diag(*free[2])
    ((whole.matrix - product).square() * whole.energy).sum().backward()
    before = factors.copy()
    STEPS["adam"](1e-3)(factors, whole)
    for name, tensor in zip(("left", "core", "right"), free, strict=True):
        moved = getattr(factors, name) - getattr(before, name)
        clear = tensor.grad.abs() > 1e-3 * tensor.grad.abs().max()
        torch.testing.assert_close(moved[clear], -1e-3 * tensor.grad[clear].sign(), rtol=1e-2, atol=1e-6)
    assert not factors.core[~factors.kept].any()


def best_of_all(factors: Factors, whole: Normalised, row: int, start: int, size: int, keep: int) -> float:
    """The least squared error of the block of one group, over all supports and values of that group."""
    left, right = written_out(factors.left).double(), written_out(factors.right).double()
    core = factors.core.double().clone()
    core[row, start : start + size] = 0
    scale = whole.energy.double().sqrt()
    rest = ((whole.matrix - left @ core @ right) * scale).flatten()
    entries = [torch.outer(left[:, row], right[start + j] * scale).flatten() for j in range(size)]
    errors = []
    for support in combinations(range(size), keep):
        basis = torch.stack([entries[j] for j in support], 1)
        values = torch.linalg.lstsq(basis, rest[:, None]).solution
        errors.append(float((rest - (basis @ values).squeeze(1)).square().sum()))
    return min(errors)


@pytest.mark.parametrize("select", ["gradient", "greedy", "random"])
@pytest.mark.parametrize(("pattern", "size", "keep"), [("2:4", 4, 2), ("1:4", 4, 1), ("4:8", 8, 4)])
def test_core_step_is_the_best_of_all_supports_and_values(
    pattern: str, size: int, keep: int, select: str
) -> None:
    """With one row of blocks the groups that changed show which were chosen, one in each block."""
    problem = heavy(4, 16, pattern=pattern)
    factors, whole = started(problem, 4, 8)
    before, error = factors.copy(), squared_error(factors, whole)
    fell = float(core_step(problem, select)(factors, whole, 1))
    assert fell == pytest.approx(error - squared_error(factors, whole), rel=1e-4)
    changed = (factors.core != before.core).view(4, 16 // size, size).any(-1).nonzero().tolist()
    assert 1 <= len(changed) <= 2
    assert len({group * size // 8 for _, group in changed}) == len(changed), "one group a block"
    for row, group in changed:
        alone = before.copy()
        span = slice(group * size, (group + 1) * size)
        alone.core[row, span] = factors.core[row, span]
        expected = best_of_all(before, whole, row, group * size, size, keep)
        assert squared_error(alone, whole) == pytest.approx(expected, rel=1e-5)
    assert check_pattern(factors.core, problem.pattern) == 0


@pytest.mark.parametrize("pattern", ["row", "matrix", "8:16"])
def test_swaps_keep_every_count_and_reach_other_supports(pattern: str) -> None:
    problem = heavy(16, 32, pattern=pattern)
    factors, whole = started(problem, 8, 16)
    before, error = factors.kept.clone(), squared_error(factors, whole)
    fell = float(core_step(problem)(factors, whole, 10))
    assert fell == pytest.approx(error - squared_error(factors, whole), rel=1e-4)
    assert fell > 0
    assert not torch.equal(before, factors.kept)
    assert torch.equal(before.view(16, 2, 16).sum(-1), factors.kept.view(16, 2, 16).sum(-1))
    assert not factors.core[~factors.kept].any()


def test_a_block_without_gradient_is_left_alone() -> None:
    problem = heavy()
    factors, whole = started(problem, moved=0)
    exact = replace(whole, matrix=factors.product())
    before = factors.copy()
    assert float(core_step(problem)(factors, exact, 3)) == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(factors.product(), before.product())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("continuous", ["als", "adam", "gd"])
def test_never_behind_nowag_p(pattern: str, continuous: str) -> None:
    problem = heavy(pattern=pattern)
    method = Armor(block=8, overhead=9, continuous=continuous, iterations=12, rate=0.3, core_steps=1)
    solution = method.prune(problem)
    whole = normalise(problem.weight, problem.inputs)
    error = (solution.weight / whole.rows[:, None] / whole.columns - whole.matrix).square() * whole.energy
    reached = float(error.sum() / whole.importance().sum())
    assert reached == pytest.approx(solution.notes["proxy_last"], rel=1e-3, abs=1e-6)
    assert solution.notes["proxy_last"] <= solution.notes["proxy_first"], "the best is kept, also of Adam"
    dropped = int((~solution.kept).sum())
    assert dropped == drop_count(solution.kept.numel(), 0.5)
    if problem.pattern.kind == "n:m":
        assert check_pattern(solution.kept, problem.pattern) == 0


def test_larger_blocks_lose_less_down_to_nothing() -> None:
    problem = heavy(16, 32)
    losses = [
        Armor(block=size, overhead=99, core_steps=0).prune(problem).notes["proxy_last"] for size in (4, 8, 16)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-2 * losses[0], "a block of all outputs makes up for nearly everything"


def test_blocks_of_one_are_nowag_p() -> None:
    problem = heavy(pattern="matrix")
    notes = Armor(block=1, iterations=5).prune(problem).notes
    assert notes["proxy_last"] == pytest.approx(notes["proxy_first"], rel=1e-6)
    assert notes["block_rows"] == notes["block_columns"] == 1


def test_what_a_product_hides_is_found() -> None:
    """Wrappers near the identity around a 2:4 core: mostly recovered, where NoWag-P loses them."""
    problem = heavy(32, 64)
    core = select(problem.weight.abs(), problem.pattern, 0.5) * problem.weight
    left, right = (
        torch.block_diag(*(torch.eye(8) + 0.1 * draw((size // 8, 8, 8), 3))) for size in problem.weight.shape
    )
    problem.weight = left @ core @ right
    notes = Armor(block=8, overhead=9).prune(problem).notes
    assert notes["proxy_last"] < 0.2 * notes["proxy_first"]


def test_it_ends_once_nothing_moves() -> None:
    problem = heavy()
    notes = Armor(block=4, overhead=9, core_steps=0, iterations=5000, patience=3).prune(problem).notes
    assert notes["iterations"] < 5000


@pytest.mark.parametrize(
    ("shape", "group", "most", "overhead", "expected"),
    [
        ((4096, 11008), 4, 128, 0.3, (128, 128)),
        ((24, 64), 4, 128, 99, (24, 64)),
        ((384, 128), 4, 128, 0.3, (24, 16)),
        ((7, 12), 4, 2, 99, (1, 4)),
        ((8, 16), 16, 128, 0.01, (1, 16)),
    ],
)
def test_sizes_of_the_blocks(
    shape: tuple[int, int], group: int, most: int, overhead: float, expected: tuple[int, int]
) -> None:
    assert block_sizes(shape, group, most, overhead) == expected


def test_notes_say_what_the_wrappers_cost() -> None:
    notes = Armor(block=8, overhead=9, iterations=1).prune(heavy(16, 32)).notes
    assert notes["extra"] == (16 * 8 + 32 * 8) / (16 * 32)


def test_unstructured_means_the_matrix() -> None:
    assert Pattern("unstructured").resolve(Armor.default_pattern).kind == "matrix"
