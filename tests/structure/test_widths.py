"""Widths that are the same everywhere: exact counts, even choices, and heads in equal numbers a group."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from secateur.anatomy.resolve import resolve
from secateur.core.errors import AnatomyError, RecipeError
from secateur.core.statistics import InputStatistics
from secateur.pipeline.ways.width import keep
from secateur.structure.minitron import Minitron
from secateur.structure.widths import Dimension, candidates, dimensions, evenest, freed, largest

ALL = ("hidden", "heads", "ffn")


def test_freed_parameters_are_the_closed_form() -> None:
    config = tiny_config("llama")
    anatomy = resolve(config)
    chosen = dimensions(anatomy, ALL, {})
    d, f, h, k, size = 40, 72, 4, config.num_key_value_heads, config.head_dim
    widths = {"hidden": d, "heads": h // k, "ffn": f}
    left = config.num_hidden_layers * ((2 * h + 2 * k) * size * d + 3 * f * d + 2 * d)
    assert anatomy.block_parameters - freed(anatomy, chosen, widths) == left


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_the_first_choice_meets_the_budget_and_is_the_evenest_that_does(sparsity: float) -> None:
    anatomy = resolve(tiny_config("llama", hidden_size=256, intermediate_size=512))
    chosen = dimensions(anatomy, ALL, {"hidden": 8, "ffn": 8})
    found = candidates(anatomy, chosen, sparsity)
    widths, removed = next(evenest(found, chosen, sparsity))
    assert removed == freed(anatomy, chosen, widths) / anatomy.block_parameters
    assert removed == pytest.approx(sparsity, abs=0.01)
    assert widths["hidden"] % 8 == widths["ffn"] % 8 == 0
    kept = [widths[one.name] / one.count for one in chosen]
    assert max(kept) - min(kept) < 0.3
    within = [share for _, share in found if share >= sparsity]
    assert next(largest(found, sparsity))[1] == min(within)


def test_heads_fill_the_hidden_size_where_their_width_follows_from_it() -> None:
    anatomy = resolve(tiny_config("gpt2"))
    found = candidates(anatomy, dimensions(anatomy, ALL, {"ffn": 8}), 0.25)
    assert found
    assert all(widths["hidden"] == 8 * widths["heads"] for widths, _ in found)


def test_every_group_keeps_as_many_heads_the_most_important_first() -> None:
    heads = Dimension("heads", 3, 1, {"heads": 2}, groups=2)
    columns = torch.tensor([1.0, 5, 3, 9, 8, 7]).repeat_interleave(2)  # two columns a head
    assert keep(heads, columns, 2)["heads"].tolist() == [1, 2, 3, 4]


def test_whole_heads_go_with_their_keys_and_values() -> None:
    [heads] = dimensions(resolve(tiny_config("gpt_neox")), ["heads"], {})
    assert (heads.count, heads.groups) == (8, 1)
    [heads] = dimensions(resolve(tiny_config("llama")), ["heads"], {})
    assert (heads.count, heads.groups, heads.spaces) == (4, 2, {"heads": 2})
    [heads] = dimensions(resolve(tiny_config("llama", num_key_value_heads=8)), ["heads"], {})
    assert (heads.count, heads.groups, dict(heads.spaces)) == (8, 1, {"kv_heads": 1, "heads": 1})


def test_importance_is_the_mean_of_a_sequence_and_l2_over_the_batch() -> None:
    inputs = InputStatistics(2, activity=torch.tensor([9.0, 16.0], dtype=torch.float64))
    assert Minitron().importance(inputs).tolist() == [3, 4]


def test_unknown_widths_and_experts_are_refused() -> None:
    with pytest.raises(RecipeError, match="some of hidden"):
        Minitron.from_options({"width": "depth"})
    with pytest.raises(AnatomyError, match="experts"):
        dimensions(resolve(tiny_config("mixtral")), ALL, {})
