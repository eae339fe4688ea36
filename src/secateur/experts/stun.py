"""STUN, first stage: experts that the router treats alike stand for one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.experts.base import ExpertMethod, ExpertProblem, Survivors, register
from secateur.experts.clustering import Cluster, Clustering, Linkage, cluster_by
from secateur.experts.merging import averages, distances_to_means, nearest, stand_for
from secateur.experts.similarity import (
    coactivation_distance,
    output_distance,
    router_cosine,
    router_distance,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stun"]


@register
class Stun(ExpertMethod):
    """Cluster the experts of a block by how the router behaves, and keep one of each cluster
    (stun, sections 2.1 to 2.3); the second stage is any method for single weights.

    Experts that no token visited go before all others, those of lower index first: they are free, and
    co-activation would never merge them (stun, section 5). A block in which nothing was visited has none.
    """

    id: ClassVar[str] = "stun"
    paper: ClassVar[Paper | None] = Paper(
        "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024, "2409.06211"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing"})
    comparable: ClassVar[bool] = True

    spread: Literal["uniform", "global"] = Field(
        "global", description="global: one threshold for the whole model; uniform: as many in every block"
    )
    similarity: Literal["router", "cosine", "coactivation", "mixed", "outputs"] = Field(
        "router",
        description="distance of router rows, their cosine, how often two experts are visited together, "
        "lambda1 times the first plus lambda2 times the third, or distance of mean outputs",
    )
    lambda1: float = Field(1.0, ge=0, description="weight of the distance of router rows in mixed")
    lambda2: float = Field(1.0, ge=0, description="weight of co-activation in mixed")
    scale_router: bool = Field(
        True, description="divide distances of router rows by the norm of the whole router"
    )
    linkage: Linkage = Field(
        "complete", description="complete, average, or stun: the rule of the published code"
    )
    representative: Literal["centroid", "frequency", "output", "recon"] = Field(
        "centroid",
        description="which member stays: nearest to the mean of the weights, most visited, nearest to the "
        "mean of the outputs, or the one with which the output of the block changes least",
    )
    mean_if_clusters: int = Field(
        2, ge=0, description="with so few clusters left, each becomes the mean of its members"
    )
    router: Literal["representative", "mean"] = Field(
        "representative", description="router row of a cluster: of the member that stays, or the mean"
    )
    dead: Literal["first", "cluster"] = Field(
        "first", description="experts that no token visited: go first, or are clustered like all others"
    )

    @property
    def statistics(self) -> frozenset[Statistic]:
        outputs: set[Statistic] = set()
        if self.similarity == "outputs" or self.representative == "output":
            outputs.add("expert_means")
        if self.representative == "recon":
            outputs.add("expert_losses")
        if outputs:
            return self.needs | outputs
        weights_only = self.similarity in ("router", "cosine") and self.representative == "centroid"
        return frozenset() if weights_only and self.dead == "cluster" else self.needs

    def score(self, problem: ExpertProblem) -> Tensor:
        import torch

        alive = self._alive(problem)
        scores = torch.full((problem.count,), -torch.inf, dtype=torch.float64)
        scores[alive] = self._clustering(problem, alive).heights()
        return scores

    def regroup(self, problem: ExpertProblem, kept: Tensor) -> Survivors:
        count, alive = len(kept), self._alive(problem)
        if count == problem.count:
            return Survivors(kept)
        living = alive.tolist()
        clusters: list[Cluster] = [(one,) for one in living]
        if count < len(living):
            parts = self._clustering(problem, alive).clusters(count)
            clusters = [tuple(living[one] for one in part) for part in parts]
        dead = sorted(set(range(problem.count)) - set(living), reverse=True)
        clusters += [(one,) for one in dead[: count - len(clusters)]]
        return self._survivors(problem, clusters)

    def distance(self, problem: ExpertProblem) -> Tensor:
        """(n, n) float64 between the experts; the smaller, the more alike."""
        if self.similarity == "cosine":
            return router_cosine(problem)
        if self.similarity == "coactivation":
            return coactivation_distance(problem)
        if self.similarity == "outputs":
            return output_distance(problem)
        apart = router_distance(problem, scaled=self.scale_router)
        if self.similarity == "mixed":
            return self.lambda1 * apart + self.lambda2 * coactivation_distance(problem)
        return apart

    def _alive(self, problem: ExpertProblem) -> Tensor:
        """The experts to be clustered, sorted int64."""
        import torch

        everyone = torch.arange(problem.count)
        if self.dead == "cluster" or problem.routing is None:
            return everyone
        visited = problem.routing.counts > 0
        return everyone[visited] if bool(visited.any()) else everyone

    def _clustering(self, problem: ExpertProblem, alive: Tensor) -> Clustering:
        return cluster_by(self.distance(problem)[alive][:, alive], self.linkage)

    def _survivors(self, problem: ExpertProblem, clusters: list[Cluster]) -> Survivors:
        import torch

        chosen = self._choose(problem, clusters)
        mean = averages(clusters, torch.ones(problem.count))
        merge = len(clusters) <= self.mean_if_clusters
        return stand_for(
            clusters, chosen, mean if merge else None, mean if merge or self.router == "mean" else None
        )

    def _choose(self, problem: ExpertProblem, clusters: list[Cluster]) -> list[int]:
        """The member of each cluster that stays."""
        import torch

        routing = problem.routing
        visits = torch.zeros(problem.count) if routing is None else routing.counts
        if self.representative == "frequency":
            return nearest(clusters, torch.zeros(problem.count), visits)
        if self.representative == "centroid":
            return nearest(clusters, distances_to_means(problem.weights, clusters), visits)
        if self.representative == "recon":
            return [min(members, key=lambda one: _lost(problem, members, one)) for members in clusters]
        means = problem.observed.means
        assert means is not None
        return nearest(clusters, distances_to_means({"": means[:, None]}, clusters), visits)


def _lost(problem: ExpertProblem, members: Cluster, stays: int) -> float:
    """Squared change of the block's output without all members but one."""
    gone, losses = [one for one in members if one != stays], problem.observed.losses
    assert losses is not None
    return float(losses[gone][:, gone].sum())
