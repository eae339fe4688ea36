"""Counts are exact, floors hold, ties go by position."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.core.errors import RecipeError
from secateur.core.goal import Goal
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import Losses, StructureMethod
from secateur.structure.flap import Flap
from secateur.structure.knapsack import loss_curves
from secateur.structure.nearest import _by_distance, nearest_uniform
from secateur.structure.wanda_structure import WandaStructure

ANATOMY = resolve(tiny_model("llama", num_hidden_layers=3).config)
SIZES = [block.size for block in ANATOMY.blocks]


def groups(seed: int) -> list[Scored]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Scored(block.index, units, torch.rand(units.count, generator=generator))
        for block in ANATOMY.blocks
        for units in units_of(block)
    ]


def removed(found: list[Scored], kept: list[torch.Tensor]) -> int:
    pairs = zip(found, kept, strict=True)
    return sum((group.units.count - len(stays)) * group.units.parameters for group, stays in pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 100),
    st.floats(0.02, 0.85),
    st.sampled_from(["uniform", "global"]),
    st.integers(1, 3),
)
def test_the_budget_is_met_to_within_a_unit_and_floors_hold(
    seed: int, sparsity: float, spread: str, min_keep: int
) -> None:
    found = groups(seed)
    method = WandaStructure.from_options({"spread": spread, "min_keep": min_keep})
    try:
        kept = allocate(found, SIZES, sparsity, method)
    except RecipeError:
        most = sum(max(0, g.units.count - min_keep) * g.units.parameters for g in found)
        assert sparsity * sum(SIZES) > most
        return
    cheapest = min(group.units.parameters for group in found)
    blocks = len(SIZES) if spread == "uniform" else 1
    floors_bind = any(len(stays) <= min_keep for stays in kept)
    if not floors_bind:
        assert abs(removed(found, kept) - sparsity * sum(SIZES)) <= cheapest * blocks
    for group, stays in zip(found, kept, strict=True):
        assert len(stays) >= min(min_keep, group.units.count)
        assert stays.tolist() == sorted(set(stays.tolist()))
        gone = sorted(set(range(group.units.count)) - set(stays.tolist()))
        if gone and len(stays):
            assert group.scores[gone].max() <= group.scores[stays].min()


def test_equal_scores_go_by_position() -> None:
    found = [Scored(g.block, g.units, torch.ones(g.units.count)) for g in groups(0)]
    for stays, group in zip(allocate(found, SIZES, 0.4, WandaStructure()), found, strict=True):
        assert stays.tolist() == list(range(group.units.count - len(stays), group.units.count))


def test_widths_stay_multiples() -> None:
    method = WandaStructure.from_options({"round_to": 16})
    for group, stays in zip(groups(0), allocate(groups(0), SIZES, 0.3, method), strict=True):
        assert group.units.kind != "ffn" or len(stays) % 16 == 0


def test_more_than_there_is_gets_the_largest_that_goes() -> None:
    with pytest.raises(RecipeError, match=r"at most 0\.\d+"):
        allocate(groups(0), SIZES, 0.999, WandaStructure())


def test_a_share_that_no_heads_make_gets_those_that_do() -> None:
    heads = [group for group in groups(0) if group.units.kind == "kv_groups"]
    method = WandaStructure.from_options({"targets": "heads"})
    with pytest.raises(RecipeError, match="whole heads make") as caught:
        allocate(heads, SIZES, 0.04, method)
    legal = heads[0].units.parameters * len(SIZES) / sum(SIZES)
    assert f"{legal:.3f}" in str(caught.value)
    kept = allocate(heads, SIZES, legal, method)
    assert {group.units.count - len(stays) for group, stays in zip(heads, kept, strict=True)} == {1}


def test_scores_of_blocks_are_standardised_before_they_compete() -> None:
    plain = groups(1)
    scaled = [Scored(g.block, g.units, g.scores * 10 ** (g.block + 1)) for g in plain]
    method: StructureMethod = WandaStructure.from_options({"spread": "global"})
    for a, b in zip(allocate(plain, SIZES, 0.3, method), allocate(scaled, SIZES, 0.3, method), strict=True):
        assert torch.equal(a, b)


def freed_heads(found: list[Scored], kept: list[torch.Tensor]) -> list[int]:
    pairs = zip(found, kept, strict=True)
    return [g.units.count - len(stays) for g, stays in pairs if not g.units.kind.endswith("ffn")]


@pytest.mark.parametrize("spread", ["uniform", "global", "sigmoid"])
def test_a_number_of_heads_is_met_and_channels_make_up_the_rest(spread: str) -> None:
    found = groups(3)
    method = WandaStructure.from_options({"spread": spread, "remove_heads": 3})
    kept = allocate(found, SIZES, 0.3, method, torch.tensor([0.1, 0.3, 0.2]))
    heads, cheapest = freed_heads(found, kept), min(group.units.parameters for group in found)
    assert sum(heads) == 3
    assert spread == "global" or heads == [1, 1, 1]
    assert abs(removed(found, kept) - 0.3 * sum(SIZES)) <= cheapest * len(SIZES)


def test_heads_rank_among_themselves_whatever_channels_score() -> None:
    """AL-MM: the lowest heads of the model go, and channels change nothing about it (flap, section 2.3)."""
    found = groups(3)
    lower = [Scored(g.block, g.units, g.scores - 9 * g.units.kind.endswith("ffn")) for g in found]
    method = Flap.from_options({"spread": "global", "remove_heads": 2})
    for own in (found, lower):
        kept = allocate(own, SIZES, 0.3, method)
        heads = [(g, stays) for g, stays in zip(own, kept, strict=True) if g.units.kind == "kv_groups"]
        worst = sorted(heads, key=lambda pair: float(pair[0].scores.min()))
        assert [len(stays) for _, stays in worst] == [1, 1, 2]
        assert all(int(stays[0]) == int(g.scores.argmax()) for g, stays in worst[:2])


def test_numbers_of_heads_that_cannot_be_are_refused() -> None:
    for options, sparsity, message in (
        ({"remove_heads": 2}, 0.3, "choose 0 or 3"),
        ({"remove_heads": 40}, 0.3, "at most 3"),
        ({"remove_heads": 3}, 0.01, "channels can meet"),
        ({"remove_heads": 0}, 0.8, "channels can meet"),
    ):
        with pytest.raises(RecipeError, match=message):
            allocate(groups(0), SIZES, sparsity, WandaStructure.from_options(options))
    channels = [group for group in groups(0) if group.units.kind == "ffn"]
    method = WandaStructure.from_options({"targets": "ffn", "remove_heads": 3})
    with pytest.raises(RecipeError, match="leave remove_heads out"):
        allocate(channels, SIZES, 0.3, method)


@pytest.mark.parametrize("spread", ["sigmoid", "global"])
@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.4])
def test_rounded_widths_meet_the_budget_to_within_half_a_step(spread: str, sparsity: float) -> None:
    found = [group for group in groups(4) if group.units.kind == "ffn"]
    method = WandaStructure.from_options({"spread": spread, "round_to": 16, "targets": "ffn"})
    kept = allocate(found, SIZES, sparsity, method, torch.tensor([0.1, 0.35, 0.2]))
    assert all(len(stays) % 16 == 0 for stays in kept)
    step = 16 * found[0].units.parameters
    assert abs(removed(found, kept) - sparsity * sum(SIZES)) <= step / 2


def goal_in_parameters(found: list[Scored], limit: float) -> Goal:
    costs = [torch.arange(g.units.count + 1, dtype=torch.float64) * g.units.parameters for g in found]
    return Goal("parameters", limit, 0.0, costs)


def whole(found: list[Scored]) -> int:
    return sum(group.units.count * group.units.parameters for group in found)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 100),
    st.floats(0.25, 0.97),
    st.sampled_from(["uniform", "global", "sigmoid", "knapsack"]),
    st.sampled_from([1, 8]),
)
def test_a_goal_is_never_exceeded_and_hardly_missed(
    seed: int, share: float, spread: str, round_to: int
) -> None:
    found = groups(seed)
    method = WandaStructure.from_options({"spread": spread, "round_to": round_to})
    goal = goal_in_parameters(found, share * whole(found))
    angles = torch.rand(len(SIZES), generator=torch.Generator().manual_seed(seed))
    kept = allocate(found, SIZES, 0.0, method, angles, goal=goal)
    left = whole(found) - removed(found, kept)
    assert left <= goal.limit
    coarsest = max(group.units.parameters * (round_to if group.units.kind == "ffn" else 1) for group in found)
    assert goal.limit - left < coarsest * (1 if spread == "knapsack" else len(SIZES))
    for group, stays in zip(found, kept, strict=True):
        assert len(stays)
        assert group.units.kind != "ffn" or len(stays) % round_to == 0


def test_a_goal_below_the_floors_names_the_smallest_that_goes() -> None:
    found = groups(0)
    floors = sum(group.units.parameters for group in found)
    with pytest.raises(RecipeError, match=f"at least {floors:,}"):
        allocate(found, SIZES, 0.0, WandaStructure(), goal=goal_in_parameters(found, floors - 1))
    kept = allocate(found, SIZES, 0.0, WandaStructure(), goal=goal_in_parameters(found, floors))
    assert all(len(stays) == 1 for stays in kept)


class Losing(WandaStructure):
    """Scores that are losses and add up."""

    losses: ClassVar[Losses] = "each"
    comparable: ClassVar[bool] = True


def lost(found: list[Scored], kept: list[torch.Tensor], method: StructureMethod) -> float:
    curves = loss_curves(found, method)
    return sum(
        float(curve[g.units.count - len(stays)]) for curve, g, stays in zip(curves, found, kept, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100), st.floats(0.05, 0.8), st.sampled_from([Losing, WandaStructure]))
def test_a_knapsack_loses_no_more_than_the_global_ranking(
    seed: int, sparsity: float, kind: type[StructureMethod]
) -> None:
    found = groups(seed)
    plans = {
        spread: allocate(found, SIZES, sparsity, kind.from_options({"spread": spread}))
        for spread in ("global", "knapsack")
    }
    cheapest = min(group.units.parameters for group in found)
    assert removed(found, plans["knapsack"]) > sparsity * sum(SIZES) - cheapest
    if removed(found, plans["global"]) <= sparsity * sum(SIZES) - cheapest:
        return  # floors left the ranking short of the budget
    losses = {spread: lost(found, kept, kind()) for spread, kept in plans.items()}
    assert losses["knapsack"] <= losses["global"] * (1 + 1e-9)


def test_a_knapsack_finds_the_best_of_all_plans() -> None:
    found = groups(3)[:4]
    method = Losing.from_options({"spread": "knapsack", "round_to": 24})
    goal = goal_in_parameters(found, 0.6 * whole(found))
    kept = allocate(found, SIZES[:2], 0.0, method, goal=goal)
    widths = [
        [*range(24, 97, 24)] if group.units.kind == "ffn" else [*range(1, group.units.count + 1)]
        for group in found
    ]
    best = min(
        sum(
            float(group.scores.double().sort().values[: group.units.count - width].sum())
            for group, width in zip(found, plan, strict=True)
        )
        for plan in product(*widths)
        if goal.met(plan)
    )
    assert lost(found, kept, method) == pytest.approx(best)


def test_scores_that_are_totals_are_not_added_up() -> None:
    class Total(Losing):
        losses: ClassVar[Losses] = "total"

    found = [Scored(g.block, g.units, torch.arange(1.0, g.units.count + 1)) for g in groups(0)[:1]]
    assert loss_curves(found, Total())[0].tolist() == [0, *range(1, found[0].units.count + 1)]
    assert loss_curves(found, Losing())[0][-1] == sum(range(1, found[0].units.count + 1))


def test_the_nearest_uniform_plan_is_uniform_as_small_and_legal() -> None:
    found = groups(5)
    method = WandaStructure.from_options({"spread": "global"})
    unequal = allocate(found, SIZES, 0.35, method)
    heads = [number for number, group in enumerate(found) if group.units.kind == "kv_groups"]
    for legal in (1, 2):
        kept = nearest_uniform(found, unequal, method, lambda widths, legal=legal: widths[heads[0]] == legal)
        assert kept is not None
        assert {len(kept[number]) for number in heads} == {legal}
        widths = {len(stays) for number, stays in enumerate(kept) if number not in heads}
        assert len(widths) == 1
        assert removed(found, kept) >= removed(found, unequal)
        channel = next(group.units.parameters for group in found if group.units.kind == "ffn")
        if widths != {found[1].units.count}:
            assert removed(found, kept) - removed(found, unequal) < channel * len(SIZES)
        for group, stays in zip(found, kept, strict=True):
            gone = group.units.others(stays)
            if len(gone):
                assert group.scores[gone].max() <= group.scores[stays].min()


def test_blocks_of_different_sizes_become_equal_where_no_stock_class_must_load_them() -> None:
    found = [
        Scored(g.block, replace(g.units, count=g.units.count - lost), g.scores[lost:])
        for g, lost in zip(groups(5), (0, 10, 1, 20, 0, 0), strict=True)
    ]
    method = WandaStructure.from_options({"spread": "global"})
    unequal = allocate(found, SIZES, 0.3, method)
    assert len({len(stays) for stays in unequal[1::2]}) > 1
    kept = nearest_uniform(found, unequal, method)
    assert kept is not None
    for kind in ("kv_groups", "ffn"):
        assert len({len(stays) for g, stays in zip(found, kept, strict=True) if g.units.kind == kind}) == 1
    assert removed(found, kept) >= removed(found, unequal)


def test_the_nearest_uniform_plan_of_many_different_blocks_is_found_at_once() -> None:
    """Were each size a kind of its own, there would be some 90 to the power of 6 plans to look at."""
    blocks = resolve(tiny_model("llama", num_hidden_layers=40).config).blocks
    method = WandaStructure.from_options({"spread": "global"})
    found = [
        Scored(block.index, replace(units, count=size), torch.rand(size))
        for block in blocks
        for units in units_of(block)
        if units.kind == "ffn"
        for size in [units.count - block.index % 7]
    ]
    kept = [torch.arange(group.units.count - group.block % 3) for group in found]
    equal = nearest_uniform(found, kept, method)
    assert equal is not None
    assert len({len(stays) for stays in equal}) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=3), st.data())
def test_widths_come_nearest_first_and_each_once(counts: list[int], data: st.DataObject) -> None:
    coarse = [SimpleNamespace(count=count, widths=partial(range, 1, count + 1)) for count in counts]
    means = [data.draw(st.floats(0, own.count)) for own in coarse]
    found = list(_by_distance(coarse, means))
    assert sorted(found) == sorted(product(*(own.widths() for own in coarse)))
    away = [sum(abs(w - m) / own.count for w, m, own in zip(at, means, coarse, strict=True)) for at in found]
    assert away == pytest.approx(sorted(away))


def test_no_uniform_plan_where_none_is_that_small() -> None:
    found = groups(5)
    method = WandaStructure.from_options({"spread": "global", "round_to": 64})
    none_left = [torch.arange(0) for _ in found]
    assert nearest_uniform(found, none_left, method, lambda widths: True) is None
