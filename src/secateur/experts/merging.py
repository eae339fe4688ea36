"""What becomes of clusters of experts: one member stands for each, alone or as a mean of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from secateur.experts.base import Survivors

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.experts.clustering import Cluster

__all__ = ["averages", "distances_to_means", "nearest", "stand_for"]

CHUNK_ELEMENTS = 1 << 24
"""Of all experts that are compared at once, in float32."""

TIE = 1e-6
"""Distances that differ by less, relatively, are equal: two experts are equally far from their mean."""


def stand_for(
    clusters: Sequence[Cluster],
    chosen: Sequence[int],
    mix: Tensor | None = None,
    router_mix: Tensor | None = None,
) -> Survivors:
    """The survivors, one a cluster.

    Args:
        clusters: of experts.
        chosen: the member of each whose place stays.
        mix, router_mix: (clusters, n), how the weights and the router rows of each are made; `None`: those
            of the member that stays.
    """
    import torch

    order = sorted(range(len(chosen)), key=lambda cluster: chosen[cluster])
    return Survivors(
        kept=torch.tensor([chosen[one] for one in order], dtype=torch.int64),
        mix=None if mix is None else mix[order].float(),
        router_mix=None if router_mix is None else router_mix[order].float(),
        clusters=tuple(clusters[one] for one in order),
    )


def averages(clusters: Sequence[Cluster], weights: Tensor) -> Tensor:
    """(clusters, n) float64, rows that sum to one: each member by its weight, or alike where all have none.

    Args:
        weights: (n,), not negative.
    """
    import torch

    mix = torch.zeros(len(clusters), len(weights), dtype=torch.float64)
    for row, members in zip(mix, clusters, strict=True):
        inside = weights[list(members)].double()
        inside = inside if bool(inside.sum() > 0) else torch.ones_like(inside)
        row[list(members)] = inside / inside.sum()
    return mix


def distances_to_means(stacks: Mapping[str, Tensor], clusters: Sequence[Cluster]) -> Tensor:
    """(n,) float64 squared distance of each expert, all its matrices in a row, to the mean of its cluster;
    infinite for an expert in none.

    Args:
        stacks: (n, out, in) each, of any floating dtype.
    """
    import torch

    count = len(next(iter(stacks.values())))
    owner = torch.full((count,), len(clusters))
    for number, members in enumerate(clusters):
        owner[list(members)] = number
    inside = (owner < len(clusters)).nonzero().squeeze(1)
    means = averages(clusters, torch.ones(count))[:, inside].float()
    found = torch.full((count,), torch.inf, dtype=torch.float64)
    found[inside] = 0
    for stack in stacks.values():
        rows = max(1, CHUNK_ELEMENTS // (count * stack.shape[2]))
        for part in torch.split(stack, rows, dim=1):
            flat = part[inside].flatten(1).float().cpu()
            found[inside] += (flat - (means @ flat)[owner[inside]]).square().sum(1, dtype=torch.float64)
    return found


def nearest(clusters: Sequence[Cluster], distances: Tensor, visits: Tensor) -> list[int]:
    """The member of each cluster that is nearest; of equals the most visited, then the first.

    Args:
        distances: (n,), not negative.
        visits: (n,).
    """
    chosen = []
    for members in clusters:
        bound = min(float(distances[one]) for one in members) * (1 + TIE)
        near = [one for one in members if float(distances[one]) <= bound]
        chosen.append(max(near, key=lambda one: (float(visits[one]), -one)))
    return chosen
