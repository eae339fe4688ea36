"""Which experts belong together: clusterings that give every number of clusters exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cluster", "Clustering", "Linkage", "Rejection", "Tree", "cluster_by", "published_clusters"]

Linkage = Literal["complete", "average", "stun"]
Cluster = tuple[int, ...]
"""Members, sorted."""

THRESHOLDS = 256
"""Most thresholds that `Rejection` looks at; more distinct distances are thinned out evenly."""


class Clustering(Protocol):
    """n things that join one by one."""

    def heights(self) -> Tensor:
        """(n,) float64: at which distance each joins another; infinite for one that is left at the end.

        The k largest are as many as there are clusters when n - k merges have happened.
        """
        ...

    def clusters(self, count: int) -> list[Cluster]:
        """Exactly so many clusters, by their first members."""
        ...


def cluster_by(distance: Tensor, linkage: Linkage) -> Clustering:
    """Cluster by (n, n) symmetric distances, which may be negative; the diagonal is not read."""
    values = distance.double().numpy()
    return Rejection(values) if linkage == "stun" else Tree(values, linkage)


class Tree:
    """Agglomerative clustering: heights rise with every merge, and clusters are nested."""

    def __init__(self, distance: np.ndarray, linkage: Literal["complete", "average"]) -> None:
        from scipy.cluster.hierarchy import linkage as merge

        self._count = len(distance)
        pairs = distance[np.triu_indices(self._count, 1)]
        self._merges = merge(pairs, linkage) if self._count > 1 else np.zeros((0, 4))

    def heights(self) -> Tensor:
        """The first member of a cluster stands for it: of two that merge, the later one joins."""
        import torch

        first, heights = list(range(self._count)), np.full(self._count, np.inf)
        for a, b, height, _ in self._merges:
            stays, joins = sorted((first[int(a)], first[int(b)]))
            heights[joins] = height
            first.append(stays)
        return torch.from_numpy(heights)

    def clusters(self, count: int) -> list[Cluster]:
        parts: dict[int, Cluster] = {one: (one,) for one in range(self._count)}
        for number, (a, b, *_) in enumerate(self._merges[: self._count - count]):
            parts[self._count + number] = tuple(sorted(parts.pop(int(a)) + parts.pop(int(b))))
        return sorted(parts.values())


class Rejection:
    """The published rule at every threshold that matters (stun, sections 2.2 and 5).

    The number of clusters does not fall steadily with the threshold and misses some numbers, so all distinct
    distances are tried. For a number that none of them gives, the next larger one is merged further, by the
    largest distance between two clusters.
    """

    def __init__(self, distance: np.ndarray) -> None:
        self._distance = distance
        self._found: dict[int, tuple[float, list[Cluster]]] = {}
        values = np.unique(distance[np.triu_indices(len(distance), 1)])
        if len(values) > THRESHOLDS:
            values = values[np.linspace(0, len(values) - 1, THRESHOLDS).round().astype(int)]
        for value in (-np.inf, *values.tolist()):
            clusters = published_clusters(distance, float(np.nextafter(value, np.inf)))
            self._found.setdefault(len(clusters), (value, clusters))

    def heights(self) -> Tensor:
        """The smallest threshold that leaves so few; no expert of its own belongs to a height."""
        import torch

        top = max(value for value, _ in self._found.values())
        heights = [
            min((value for found, (value, _) in self._found.items() if found <= left), default=top)
            for left in range(1, len(self._distance))
        ]
        return torch.tensor([np.inf, *heights], dtype=torch.float64)

    def clusters(self, count: int) -> list[Cluster]:
        start = self._found[min(found for found in self._found if found >= count)][1]
        apart = np.array([[self._distance[np.ix_(a, b)].max() for b in start] for a in start])
        joined = Tree(apart, "complete").clusters(count)
        return sorted(tuple(sorted(one for part in parts for one in start[part])) for parts in joined)


def published_clusters(distance: np.ndarray, threshold: float) -> list[Cluster]:
    """Clusters by the rule of the paper's code at one threshold (stun, section 2.2).

    Pairs nearer than the threshold come by distance, equal ones by index. A pair (u, v) joins two clusters
    if all members of u's are nearer than the threshold to v, and all of v's to u; the entries that were
    looked at can never be used again, nor can those of a pair that was rejected.
    """
    count = len(distance)
    left, right = np.triu_indices(count, 1)
    order = np.argsort(distance[left, right], kind="stable")
    order = order[: np.searchsorted(distance[left, right][order], threshold)]
    free = distance.tolist()
    for one in range(count):
        free[one][one] = np.inf
    members = [[one] for one in range(count)]
    for u, v in zip(left[order].tolist(), right[order].tolist(), strict=True):
        if free[u][v] == np.inf:
            continue
        ours, theirs = members[u], members[v]
        if max(map(free[v].__getitem__, ours)) < threshold > max(map(free[u].__getitem__, theirs)):
            for one, others in ((v, ours), (u, theirs)):
                for other in others:
                    free[one][other] = free[other][one] = np.inf
            ours.extend(theirs)
            for one in theirs:
                members[one] = ours
        free[u][v] = free[v][u] = np.inf
    return sorted({tuple(sorted(part)) for part in members})
