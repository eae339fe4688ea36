"""Units that go a few at a time: budgets, targets, coarse units that wait, and what a step adds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.structure.adapt_pruner import AdaptPruner, importance
from secateur.structure.microsteps import Shrinking

ANATOMY = resolve(tiny_model("llama", num_hidden_layers=4, num_key_value_heads=4).config)
GROUPS = [(block.index, units) for block in ANATOMY.blocks for units in units_of(block)]
TOTAL = ANATOMY.block_parameters


def shrinking(sparsity: float, **options: object) -> Shrinking:
    return Shrinking(GROUPS, len(ANATOMY.blocks), sparsity * TOTAL, AdaptPruner.from_options(options))


def scores_of(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(units.count, generator=generator) for _, units in GROUPS]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 100), st.floats(0.02, 0.85), st.sampled_from([0.0, 0.02, 0.05]), st.sampled_from([1, 8])
)
def test_the_budget_is_spent_to_within_the_cheapest_unit(
    seed: int, sparsity: float, amplitude: float, round_to: int
) -> None:
    state = shrinking(sparsity, amplitude=amplitude, round_to=round_to)
    generator = torch.Generator().manual_seed(seed)
    freed, gone = 0, state.gone
    while blocks := state.open_blocks:
        more = state.method.increments(torch.rand(len(blocks), generator=generator).double())
        state.take(dict(zip(blocks, more.tolist(), strict=True)), scores_of(seed))
        assert state.freed >= freed
        assert all(now >= before for now, before in zip(state.gone, gone, strict=True))
        assert float(state.targets.min()) >= 0
        assert float(state.targets.max()) <= 0.99
        freed, gone = state.freed, state.gone
    channels = [
        len(stays) for (_, units), stays in zip(GROUPS, state.kept(), strict=True) if units.kind == "ffn"
    ]
    assert freed <= sparsity * TOTAL
    assert all(len(stays) >= 1 for stays in state.kept())
    assert all(count % round_to == 0 for count in channels)
    if max(channels) > round_to:  # channels are left to spend the rest on
        cheapest = min(units.parameters for _, units in GROUPS)
        assert freed > sparsity * TOTAL - cheapest * round_to


def test_targets_grow_evenly_and_heads_wait_until_one_is_due() -> None:
    """Four key-value heads: the first goes when the target passes a quarter."""
    state = shrinking(0.9, amplitude=0.0, step=0.1)
    heads = [number for number, (_, units) in enumerate(GROUPS) if units.kind == "kv_groups"]
    seen = []
    for step in range(1, 6):
        state.take(dict.fromkeys(range(4), 0.1), scores_of(0))
        assert state.targets.tolist() == pytest.approx([step / 10] * 4)
        seen.append([state.gone[number] for number in heads])
    assert seen == [[0] * 4, [0] * 4, [1] * 4, [1] * 4, [2] * 4]


def test_the_lowest_go_first_and_never_come_back() -> None:
    state, scores = shrinking(0.5, amplitude=0.0, step=0.1), scores_of(0)
    state.take(dict.fromkeys(range(4), 0.1), scores)
    first = [set((steps == 1).nonzero().flatten().tolist()) for steps in state.removed_at]
    for gone, values in zip(first, scores, strict=True):
        assert gone == set(values.argsort()[: len(gone)].tolist())
    reversed_scores = [-values for values in scores]
    state.take(dict.fromkeys(range(4), 0.1), reversed_scores)
    for gone, steps in zip(first, state.removed_at, strict=True):
        assert gone == set((steps == 1).nonzero().flatten().tolist())
    ffn = GROUPS.index(next(group for group in GROUPS if group[1].kind == "ffn"))
    second = set((state.removed_at[ffn] == 2).nonzero().flatten().tolist())
    assert second == set(scores[ffn].argsort(descending=True)[: len(second)].tolist())


def test_a_target_does_not_fall_below_what_is_gone() -> None:
    state = shrinking(0.5, targets="ffn")
    state.take({0: 0.5, 1: 0.1}, scores_of(0))
    gone = state.gone
    before = state.targets.clone()
    state.take({0: -0.4, 1: 0.1}, scores_of(0))
    block = [(state.gone[n], units) for n, (index, units) in enumerate(GROUPS) if index == 0]
    actual = sum(n * u.parameters for n, u in block) / sum(u.count * u.parameters for _, u in block)
    assert float(state.targets[0]) == pytest.approx(actual)
    assert float(state.targets[0]) <= float(before[0])
    assert [gone[n] for n, (index, _) in enumerate(GROUPS) if index == 0] == [n for n, _ in block]


def test_what_steps_add_is_the_step_on_average() -> None:
    moves = torch.tensor([0.4, 0.01, 0.02, 0.1, 0.03]).double()
    for normalise in ("maxabs", "std", "rank"):
        method = AdaptPruner.from_options({"normalise": normalise})
        more = method.increments(moves)
        assert float(more.mean()) == pytest.approx(0.02)
        assert more.argsort().tolist() == moves.argsort(descending=True).tolist()
        assert method.increments(torch.full((5,), 0.3).double()).tolist() == [0.02] * 5
        reverse = method.increments(-moves)
        assert reverse.argsort().tolist() == moves.argsort().tolist()
    assert importance(moves, "maxabs").abs().max() == 1
    assert importance(moves, "rank").tolist() == [1, -1, -0.5, 0.5, 0]
    assert float(importance(moves, "std").square().mean()) == pytest.approx(1)
    assert AdaptPruner.from_options({"amplitude": 0}).increments(moves).tolist() == [0.02] * 5
