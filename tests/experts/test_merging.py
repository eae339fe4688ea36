"""Means of clusters, and who is near them."""

from __future__ import annotations

import pytest
import torch

from experts.problems import make_problem
from secateur.experts import merging
from secateur.experts.merging import averages, distances_to_means, nearest, stand_for

CLUSTERS = [(0, 3, 4), (1,), (2, 6)]


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_distances_are_to_the_mean_over_all_matrices(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK_ELEMENTS", chunk)
    stacks = make_problem().weights
    found = distances_to_means(stacks, CLUSTERS)
    flat = torch.cat([stack.flatten(1) for stack in stacks.values()], dim=1).double()
    for members in CLUSTERS:
        inside = flat[list(members)]
        expected = (inside - inside.mean(0)).square().sum(1)
        torch.testing.assert_close(found[list(members)], expected, rtol=1e-5, atol=1e-5)
    assert found[[5, 7]].tolist() == [torch.inf, torch.inf]


def test_averages_go_by_weight_and_by_none_alike() -> None:
    found = averages([(0, 2), (1, 3)], torch.tensor([1.0, 0.0, 3.0, 0.0]))
    assert found.tolist() == [[0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5]]


def test_the_nearest_then_the_most_visited_then_the_first() -> None:
    distances = torch.tensor([2.0, 1.0, 1.0, 1.0 + 1e-9, 5.0])
    assert nearest([(0, 1, 4)], distances, torch.zeros(5)) == [1]
    assert nearest([(1, 2, 3)], distances, torch.tensor([9.0, 1, 1, 2, 9])) == [3]
    assert nearest([(1, 2, 3)], distances, torch.tensor([9.0, 2, 2, 1, 9])) == [1]


def test_places_are_sorted_and_mixes_go_with_them() -> None:
    mix = averages([(0, 3), (1, 2)], torch.ones(4))
    found = stand_for([(0, 3), (1, 2)], [3, 1], mix)
    assert found.kept.tolist() == [1, 3]
    assert found.clusters == ((1, 2), (0, 3))
    assert found.mix.tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]]
    assert found.router_mix is None
