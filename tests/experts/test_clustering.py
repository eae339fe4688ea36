"""Clusterings against naive ones, and the published rule against its worked example."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.experts import clustering
from secateur.experts.clustering import Cluster, Linkage, Rejection, cluster_by, published_clusters

LINKAGES: tuple[Linkage, ...] = ("complete", "average", "stun")

EXAMPLE = np.array(
    [
        [0.0, 0.1, 0.3, 0.9, 1.0],
        [0.1, 0.0, 0.15, 0.8, 0.9],
        [0.3, 0.15, 0.0, 0.7, 0.8],
        [0.9, 0.8, 0.7, 0.0, 0.2],
        [1.0, 0.9, 0.8, 0.2, 0.0],
    ]
)


def distances(count: int, seed: int, width: int = 4) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def naive(distance: Tensor, linkage: str, count: int) -> list[Cluster]:
    """Merge the two nearest clusters until so many are left."""
    parts: list[Cluster] = [(one,) for one in range(len(distance))]
    while len(parts) > count:
        a, b = min(combinations(parts, 2), key=lambda pair: apart(distance, linkage, *pair))
        parts = [part for part in parts if part not in (a, b)] + [tuple(sorted(a + b))]
    return sorted(parts)


def apart(distance: Tensor, linkage: str, one: Cluster, other: Cluster) -> float:
    between = distance[list(one)][:, list(other)]
    return float(between.max() if linkage == "complete" else between.mean())


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.05, [(0,), (1,), (2,), (3,), (4,)]),
        (0.12, [(0, 1), (2,), (3,), (4,)]),
        (0.18, [(0, 1), (2,), (3,), (4,)]),  # (1, 2) is nearer, but 0 is too far from 2
        (0.25, [(0, 1), (2,), (3, 4)]),
        (0.35, [(0, 1, 2), (3, 4)]),
        (0.75, [(0, 1, 2), (3, 4)]),
        (1.1, [(0, 1, 2, 3, 4)]),
    ],
)
def test_the_published_rule_on_the_worked_example(threshold: float, expected: list[Cluster]) -> None:
    assert published_clusters(EXAMPLE, threshold) == expected


def test_all_numbers_of_clusters_of_the_worked_example() -> None:
    found = Rejection(EXAMPLE)
    assert found.heights().tolist() == [np.inf, 0.9, 0.3, 0.2, 0.1]
    assert found.clusters(3) == [(0, 1), (2,), (3, 4)]
    assert found.clusters(2) == [(0, 1, 2), (3, 4)]


@pytest.mark.parametrize("linkage", ["complete", "average"])
@pytest.mark.parametrize("seed", range(3))
def test_trees_are_those_of_naive_merging(linkage: Linkage, seed: int) -> None:
    distance = distances(9, seed)
    found = cluster_by(distance, linkage)
    heights = found.heights().sort(descending=True).values
    for count in range(1, 10):
        clusters = naive(distance, linkage, count)
        assert found.clusters(count) == clusters
        if linkage == "complete" and count < 9:
            widest = max(float(distance[list(part)][:, list(part)].max()) for part in clusters)
            assert widest <= heights[count]
    assert heights[0] == torch.inf


def test_first_members_stand_for_clusters_in_the_heights_of_a_tree() -> None:
    found = cluster_by(distances(9, 0), "complete")
    order = found.heights().argsort(descending=True)
    for count in range(1, 10):
        assert sorted(order[:count].tolist()) == [part[0] for part in found.clusters(count)]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_every_number_of_clusters_is_reached(linkage: Linkage, seed: int) -> None:
    found = cluster_by(distances(12, seed), linkage)
    for count in range(1, 13):
        clusters = found.clusters(count)
        assert len(clusters) == count
        assert sorted(one for part in clusters for one in part) == list(range(12))
    assert found.heights().isfinite().sum() == 11


def test_heights_follow_the_published_rule_though_its_numbers_go_up_and_down() -> None:
    """As many heights lie above a threshold as clusters are left at it, or at the best one before."""
    unsteady = 0
    for seed in range(12):
        distance = distances(12, seed).numpy()
        values = np.unique(distance[np.triu_indices(12, 1)])
        counts = [len(published_clusters(distance, float(np.nextafter(v, 9)))) for v in values]
        heights = Rejection(distance).heights()
        for value, left in zip(values, np.minimum.accumulate(counts), strict=True):
            assert int((heights > value).sum()) == left
        unsteady += any(after > before for before, after in pairwise(counts))
    assert unsteady > 0


def test_a_number_that_no_threshold_gives_is_merged_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first and the last threshold alone, six clusters come from the eleven of the first."""
    monkeypatch.setattr(clustering, "THRESHOLDS", 2)
    distance = distances(12, 0)
    first = float(np.nextafter(float(distance[distance > 0].min()), 9))
    start = published_clusters(distance.numpy(), first)
    assert len(start) == 11
    rows = [[apart(distance, "complete", a, b) for b in start] for a in start]
    parts = naive(torch.tensor(rows), "complete", 6)
    expected = sorted(tuple(sorted(one for part in some for one in start[part])) for some in parts)
    assert Rejection(distance.numpy()).clusters(6) == expected


@pytest.mark.parametrize("linkage", LINKAGES)
def test_order_and_origin_do_not_matter(linkage: Linkage) -> None:
    distance = distances(10, 3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = cluster_by(distance[order][:, order] - 7, linkage)
    for count in range(1, 11):
        back = sorted(tuple(sorted(order[list(part)].tolist())) for part in moved.clusters(count))
        assert back == cluster_by(distance, linkage).clusters(count)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_equal_things_join_first_and_one_thing_is_a_cluster(linkage: Linkage) -> None:
    twice = distances(5, 1)[[0, 1, 2, 3, 4] * 2][:, [0, 1, 2, 3, 4] * 2]
    assert cluster_by(twice, linkage).clusters(5) == [(one, one + 5) for one in range(5)]
    assert cluster_by(torch.zeros(1, 1), linkage).clusters(1) == [(0,)]
    assert cluster_by(torch.zeros(1, 1), linkage).heights().tolist() == [torch.inf]
