"""Selection against a brute-force oracle: a stable sort of every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import NumericsError, RecipeError
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern, drop_count, drop_smallest, global_counts, select

PATTERNS = ["row", "matrix", "1:4", "2:4", "3:4", "4:8", "1:2", "5:16"]


def stable_drop(flat: Tensor, count: int) -> Tensor:
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[torch.argsort(flat, stable=True)[:count]] = False
    return kept


def oracle(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    width = {"row": scores.shape[-1], "matrix": scores.shape[-1] * scores.shape[-2]}.get(
        pattern.kind, pattern.of
    )
    count = pattern.of - pattern.keep if pattern.kind == "n:m" else drop_count(width, sparsity)
    groups = scores.reshape(-1, width)
    return torch.stack([stable_drop(group, count) for group in groups]).view(scores.shape)


def draw_scores(seed: int, shape: tuple[int, ...], levels: int) -> Tensor:
    """Few levels make many ties; 0 levels means continuous scores of either sign."""
    generator = torch.Generator().manual_seed(seed)
    if levels == 0:
        return torch.randn(shape, generator=generator)
    return torch.randint(levels, shape, generator=generator).float()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 7),
    groups=st.integers(1, 4),
    levels=st.sampled_from([0, 1, 2, 5]),
    text=st.sampled_from(PATTERNS),
    sparsity=st.floats(0, 0.999),
)
def test_select_is_a_stable_sort_of_every_group(seed, batch, rows, groups, levels, text, sparsity):
    scores = draw_scores(seed, (*batch, rows, groups * 16), levels)
    before = scores.clone()
    pattern = Pattern.parse(text)
    kept = select(scores, pattern, sparsity)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, oracle(scores, pattern, sparsity))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["row", "matrix", "2:4"])
def test_every_float_dtype(dtype, text):
    scores = draw_scores(0, (9, 32), 0).to(dtype)
    pattern = Pattern.parse(text)
    assert torch.equal(select(scores, pattern, 0.6), oracle(scores.double(), pattern, 0.6))


def test_float64_scores_are_not_rounded():
    scores = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert select(scores, Pattern("row"), 0.5).tolist() == [[True, False]]


def test_counts_survive_decimal_fractions():
    assert drop_count(10, 0.7) == 7
    assert drop_count(10, 0.3) == 3
    assert drop_count(1000, 0.29) == 290
    assert drop_count(3, 0.5) == 1


def test_views_that_are_not_contiguous():
    scores = draw_scores(3, (32, 8), 3).T
    for text in ("row", "matrix", "2:4", "5:16"):
        pattern = Pattern.parse(text)
        assert torch.equal(select(scores, pattern, 0.5), oracle(scores, pattern, 0.5))


def test_infinite_scores_stay():
    scores = torch.tensor([[float("inf"), 1.0, 2.0, float("inf")]])
    assert select(scores, Pattern.parse("2:4"), 0.5).tolist() == [[True, False, False, True]]
    assert select(scores, Pattern("row"), 0.5).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("text", ["row", "matrix", "2:4"])
@pytest.mark.parametrize("place", [0, 7])
def test_nan_is_refused_by_name(text, place):
    scores = torch.ones(2, 8)
    scores[1, place] = float("nan")
    with pytest.raises(NumericsError, match=r"3\.mlp\.up_proj"):
        select(scores, Pattern.parse(text), 0.5, name="3.mlp.up_proj")


def test_a_pattern_that_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="6 inputs"):
        select(torch.ones(2, 6), Pattern.parse("2:4"), 0.5)


def test_a_global_pattern_is_not_a_question_about_one_matrix():
    with pytest.raises(RecipeError, match="global"):
        select(torch.ones(2, 8), Pattern("global"), 0.5)


def test_an_empty_matrix_keeps_nothing_and_breaks_nothing():
    assert select(torch.ones(0, 8), Pattern("row"), 0.5).shape == (0, 8)


def test_drop_smallest_at_the_ends():
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert drop_smallest(scores, 0).all()
    assert not drop_smallest(scores, 3).any()


def test_check_pattern_counts_the_groups_that_break_it():
    weight = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert check_pattern(weight, Pattern.parse("2:4")) == 2
    assert check_pattern(weight, Pattern.parse("4:8")) == 1
    assert check_pattern(weight, Pattern("row"), 0.5) == 1
    assert check_pattern(weight, Pattern("matrix"), 0.5) == 1
    assert check_pattern(weight, Pattern("matrix"), 7 / 16) == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5),
    levels=st.sampled_from([0, 1, 3, 40]),
    sparsity=st.floats(0, 0.999),
)
def test_global_counts_are_those_of_one_long_vector(seed, shapes, levels, sparsity):
    matrices = {f"m{i}": draw_scores(seed + i, shape, levels) for i, shape in enumerate(shapes)}
    counts = global_counts(lambda: matrices.items(), sparsity)
    kept = stable_drop(
        torch.cat([scores.flatten() for scores in matrices.values()]),
        drop_count(sum(scores.numel() for scores in matrices.values()), sparsity),
    )
    parts = kept.split([scores.numel() for scores in matrices.values()])
    assert counts == {name: int((~part).sum()) for name, part in zip(matrices, parts, strict=True)}
    masks = [drop_smallest(scores.flatten(), counts[name]) for name, scores in matrices.items()]
    assert torch.equal(torch.cat(masks), kept)


def test_global_counts_order_negative_zero_and_tiny_scores():
    scores = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, float("inf"), -3.0])
    assert global_counts(lambda: [("a", scores[:3]), ("b", scores[3:])], 0.5) == {"a": 1, "b": 2}


def test_global_counts_refuse_nan_by_name():
    with pytest.raises(NumericsError, match="second"):
        global_counts(lambda: [("first", torch.ones(3)), ("second", torch.tensor([1.0, float("nan")]))], 0.5)


def test_global_counts_notice_scores_that_change():
    draws = iter(range(3))

    def passes() -> list[tuple[str, Tensor]]:
        return [("a", torch.full((8,), float(next(draws) ** 8)))]

    with pytest.raises(NumericsError, match="changed"):
        global_counts(passes, 0.5)
