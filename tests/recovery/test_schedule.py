"""Shards add up to the data, and one curve runs through all stages."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.recovery.base import learning_rate
from secateur.recovery.schedule import Split, shard_sizes, shard_weights, stage_sparsities


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from(["linear", "constant"]))
def test_shards_are_all_of_the_data_in_proportion(items: int, stages: int, split: Split) -> None:
    sizes, weights = shard_sizes(items, stages, split), shard_weights(stages, split)
    assert len(sizes) == stages
    assert sum(sizes) == items
    assert sum(weights) == pytest.approx(1)
    assert all(abs(size - items * weight) < 1.001 for size, weight in zip(sizes, weights, strict=True))


@pytest.mark.parametrize("stages", [1, 5, 20])
def test_linear_weights_are_the_published_ones(stages: int) -> None:
    expected = [2 * i / (stages * (stages + 1)) for i in range(1, stages + 1)]
    assert shard_weights(stages) == pytest.approx(expected)


def test_stages_run_through_the_curve_of_a_single_run() -> None:
    sizes = shard_sizes(1000, 7)
    ends = [0, *itertools.accumulate(sizes)]
    single = [learning_rate(step, 1000, schedule="wsd") for step in range(1000)]
    staged = [
        learning_rate(step, size, schedule="wsd", part=(start / 1000, (start + size) / 1000))
        for start, size in zip(ends, sizes, strict=False)
        for step in range(size)
    ]
    assert staged == pytest.approx(single)


@given(st.floats(0.05, 0.9), st.integers(1, 20))
def test_stages_remove_equal_amounts_and_together_all(sparsity: float, stages: int) -> None:
    left, gone = 1.0, []
    for share in stage_sparsities(sparsity, stages):
        gone.append(left * share)
        left -= gone[-1]
    assert left == pytest.approx(1 - sparsity)
    assert gone == pytest.approx([sparsity / stages] * stages)
