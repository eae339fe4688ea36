"""Levels of one matrix: nested, exact, and what stands for all of them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.structure.levels import Ladder, Version, ladders, solve, stand_in
from secateur.structure.tyr import Tyr

BLOCKS = resolve(tiny_model("llama", num_hidden_layers=3).config).blocks
GROUPS = [(block.index, units) for block in BLOCKS for units in units_of(block)]
FFN = next(units for _, units in GROUPS if units.kind == "ffn")


def solved(method: Tyr, ladder: Ladder) -> tuple[dict[int, Version], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, FFN.count, generator=generator)
    inputs = inputs + 0.5 * inputs.roll(1, 1)
    weight, hessian = torch.randn(FFN.writer.shape, generator=generator), inputs.T @ inputs
    return solve(ladder, torch.rand(FFN.count, generator=generator), weight, hessian, method), weight, hessian


def test_levels_are_nested_and_their_loss_only_grows() -> None:
    versions, weight, hessian = solved(Tyr(), Ladder(0, FFN, 48, 10, -4, 4))
    losses, outer = [], None
    for level in range(-4, 5):
        kept, new = versions[level]
        assert len(kept) == 96 - (48 + 10 * level)
        assert new.shape == (64, len(kept))
        assert outer is None or set(kept.tolist()) < outer
        outer = set(kept.tolist())
        change = weight.double().clone()
        change[:, kept] -= new.double()
        losses.append(float(((change @ hessian.double()) * change).sum()))
        residual = (change @ hessian.double())[:, kept]
        assert residual.abs().max() < 1e-3 * float(hessian.diagonal().max())
    assert losses == sorted(losses)


def test_a_level_that_removes_nothing_is_the_matrix_itself() -> None:
    versions, weight, _ = solved(Tyr(), Ladder(0, FFN, 8, 8, -1, 1))
    torch.testing.assert_close(versions[-1].weight, weight, rtol=1e-5, atol=1e-6)


def test_without_compensation_columns_stay_as_they_are() -> None:
    versions, weight, _ = solved(Tyr.from_options({"compensate": "none"}), Ladder(0, FFN, 8, 8, 0, 2))
    for kept, new in versions.values():
        assert torch.equal(new, weight[:, kept])


def test_what_stands_for_all_levels_is_the_mean_weighted_by_what_stays() -> None:
    versions, _, _ = solved(Tyr(), Ladder(0, FFN, 48, 12, -2, 2))
    whole = torch.zeros(5, 64, 96)
    shares = []
    for number, version in enumerate(versions.values()):
        whole[number][:, version.kept] = version.weight
        shares.append(1 - (96 - len(version.kept)) / 96)
    expected = torch.einsum("l,ldc->dc", torch.tensor(shares) / sum(shares), whole)
    found = stand_in(FFN, versions, "expected")
    assert found is not None
    torch.testing.assert_close(found, expected)
    median = stand_in(FFN, versions, "median")
    assert median is not None
    assert torch.equal(median, whole[2])
    assert stand_in(FFN, versions, "none") is None


def test_steps_halve_down_to_one_unit_and_are_shared_by_the_blocks() -> None:
    removed = [units.count // 2 for _, units in GROUPS]
    steps = [[ladder.step for ladder in ladders(GROUPS, removed, number, Tyr())] for number in range(8)]
    assert [row[GROUPS.index((0, FFN))] for row in steps] == [12, 6, 3, 2, 1, 1, 1, 1]
    for row in steps:
        for kind in ("ffn", "kv_groups"):
            own = {s for s, (_, units) in zip(row, GROUPS, strict=True) if units.kind == kind}
            assert len(own) == 1
            assert own != {0}


@pytest.mark.parametrize("options", [{}, {"min_keep": 20}, {"levels": 3}, {"round_to": 8}])
def test_levels_stay_within_what_can_go(options: dict[str, int]) -> None:
    method = Tyr.from_options(options)
    for gone in (0, 8, 48, 72):
        for ladder in ladders([(0, FFN)], [gone], 0, method):
            low, high = ladder.removed_at(ladder.lowest), ladder.removed_at(ladder.highest)
            assert 0 <= low <= gone <= high <= max(gone, FFN.count - method.min_keep)
            assert ladder.highest - ladder.lowest < method.levels
            assert ladder.step % method.round_to == 0
            assert ladder.gene.cost == ladder.step * FFN.parameters
