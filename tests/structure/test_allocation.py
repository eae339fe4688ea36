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
