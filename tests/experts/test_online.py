"""Which experts a token does without, and what becomes of the weights of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.core.attention import attention_received
from secateur.core.errors import InputError
from secateur.experts.online import (
    MedianRatio,
    OnlineBlock,
    OnlinePlan,
    Renormalise,
    protected,
    reroute,
)

GATES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])


def test_experts_below_the_ratio_go_and_the_first_stays() -> None:
    drop = MedianRatio({3: 0.5}).drop(3, GATES)
    assert drop.tolist() == [[False, True], [False, False], [True, False]]
    assert not MedianRatio({3: 0.0}).drop(3, GATES).any()
    assert MedianRatio({3: 1.5}).drop(3, GATES).sum(1).tolist() == [1, 1, 1]
    assert MedianRatio({3: 1.5}).drop(3, torch.full((2, 3), 0.25)).sum(1).tolist() == [2, 2]


def test_more_than_two_are_compared_with_the_first() -> None:
    gates = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert MedianRatio({0: 0.4}).drop(0, gates).tolist() == [[False, False, True, True]]


def test_rerouted_weights_follow_the_router() -> None:
    routes, drop = torch.tensor([[4, 2], [1, 0], [3, 5]]), MedianRatio({0: 0.5}).drop(0, GATES)
    to, gates = reroute(routes, GATES, drop, 6, Renormalise(True))
    assert to.tolist() == [[4, 6], [1, 0], [6, 5]]
    assert gates[[0, 2]].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert gates[1].equal(GATES[1]), "what loses nothing keeps its weights to the bit"
    _, scaled = reroute(routes, GATES, drop, 6, Renormalise(True, 2.5))
    assert scaled[0].tolist() == [2.5, 0.0]
    _, plain = reroute(routes, GATES, drop, 6, Renormalise(False))
    assert plain[0].tolist() == pytest.approx([0.9, 0.0])


def test_the_most_important_real_tokens_of_each_sequence_are_protected() -> None:
    importance = torch.tensor([[5.0, 1, 4, 3], [9, 8, 1, 2]])
    real = torch.tensor([[True, True, True, True], [False, False, True, True]])
    found = protected(importance, real, 0.5)
    assert found.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert protected(importance, real, 1.0).equal(real)
    assert not protected(importance, real, 0.2).any(), "int(0.8) tokens"


def naive(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whole matrices: column sums over the queries that may look."""
    heads = query.shape[1] // key.shape[1]
    products = query @ key.repeat_interleave(heads, 1).mT * 0.3
    weights = products.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
    return weights.sum(1) / mask[:, 0].sum(1).clamp_min(1)


@pytest.mark.parametrize("length", [5, 128, 300])
def test_attention_received_is_that_of_whole_matrices(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key = torch.randn(2, 2, length, 8, generator=generator)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    expected = naive(query, key, causal)
    for mask in (None, causal, torch.zeros(2, 1, length, length).masked_fill(~causal, torch.finfo().min)):
        torch.testing.assert_close(attention_received(query, key, 0.3, mask), expected)
    key[:, :, 1] *= 5  # it changes with attention: rows of the matrix always sum to one, columns do not
    assert not torch.allclose(attention_received(query, key, 0.3), expected)


def test_attention_of_padding_does_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(2))
    real = torch.tensor([[False, False, True, True, True, True]])
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    found = attention_received(query, key, 0.3, mask, real)
    alone = attention_received(query[:, :, 2:], key[:, :, 2:], 0.3)
    torch.testing.assert_close(found[:, 2:], alone)
    assert found[0, :2].tolist() == [0.0, 0.0]


def test_sinks_take_attention_away() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(2))
    none = attention_received(query, key, 0.3, sinks=torch.full((2,), -torch.inf))
    torch.testing.assert_close(none, attention_received(query, key, 0.3))
    assert bool((attention_received(query, key, 0.3, sinks=torch.zeros(2)) < none).all())


def test_the_plan_comes_back_and_leaves_the_first_blocks_alone(tmp_path: Path) -> None:
    losses = [0.5, 0.4, 0.3, 0.1, 0.2]
    plan = OnlinePlan(
        blocks=tuple(OnlineBlock(block=i, medians=(0.5,), loss=loss) for i, loss in enumerate(losses))
    )
    (tmp_path / "odp.json").write_text(plan.dumps())
    assert OnlinePlan.load(tmp_path) == plan == OnlinePlan.load(tmp_path / "odp.json")
    assert plan.usual() == [2, 3, 4]
    assert plan.usual(2) == [3, 4]


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2, "blocks": [{"block": 0, "medians": [0.5]}]}'])
def test_a_plan_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "odp.json").write_text(text)
    with pytest.raises(InputError, match=r"odp\.json"):
        OnlinePlan.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        OnlinePlan.load(tmp_path / "nothing.json")
