"""Counts are exact, floors hold, ties go by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.core.errors import RecipeError
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import StructureMethod
from secateur.structure.flap import Flap
from secateur.structure.units import units_of
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
