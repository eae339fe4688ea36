"""Shards add up to the data, and one curve runs through all stages."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.recovery.schedule import (
    Curve,
    Split,
    learning_rate,
    shard_sizes,
    shard_weights,
    stage_targets,
)


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


@pytest.mark.parametrize("curve", ["wsd", "cosine"])
def test_stages_run_through_the_curve_of_a_single_run(curve: Curve) -> None:
    steps = 1000
    single = [learning_rate(step, steps, peak=2e-5, minimum=2e-6, curve=curve) for step in range(steps)]
    staged, start = [], 0
    for size in shard_sizes(steps, 7):
        staged += [
            learning_rate(start + local, steps, peak=2e-5, minimum=2e-6, curve=curve) for local in range(size)
        ]
        start += size
    assert staged == single
    jumps = [abs(after - before) for before, after in itertools.pairwise(single)]
    assert max(jumps) <= 2e-5 / 50 * 1.001  # nowhere steeper than the warm-up
    assert max(single) == 2e-5
    assert single[-1] == pytest.approx(2e-6)


def test_warmup_plateau_and_decay_have_their_lengths() -> None:
    rates = [learning_rate(step, 200, peak=1.0) for step in range(200)]
    assert [rate == 1.0 for rate in rates] == [False] * 9 + [True] * 171 + [False] * 20
    assert rates[:9] == pytest.approx([0.1 * step for step in range(1, 10)])
    assert rates[180:] == pytest.approx([1 - 0.05 * step for step in range(1, 21)])


def test_targets_fall_evenly_to_the_last() -> None:
    targets = stage_targets(376_100_000, 143_100_000, 20)
    assert targets[-1] == 143_100_000
    steps = [before - after for before, after in zip([376_100_000, *targets], targets, strict=False)]
    assert max(steps) - min(steps) <= 1
