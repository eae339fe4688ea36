"""Merging: experts whose outputs are alike become their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.experts.base import ExpertMethod, ExpertProblem, Survivors, register
from secateur.experts.clustering import Clustering, cluster_by
from secateur.experts.merging import averages, nearest, stand_for
from secateur.experts.similarity import output_distance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MergeExperts"]


@register
class MergeExperts(ExpertMethod):
    """Hierarchical clustering of the experts' mean outputs over all calibration tokens, whatever the router
    does; each cluster becomes the mean of its members, by how often they are visited.

    An expert without a visit adds nothing to its cluster; where all members are such, they count alike. The
    published method keeps all rows of the router and lets those of a cluster lead to one expert. A smaller
    checkpoint has one row: the same mean, or that of the member most visited.
    """

    id: ClassVar[str] = "merge-experts"
    paper: ClassVar[Paper | None] = Paper(
        "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", 2024, "2410.08589"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing", "expert_means"})
    comparable: ClassVar[bool] = True

    linkage: Literal["average", "complete"] = Field(
        "average", description="distance of two clusters: the average or the largest of their members"
    )
    router: Literal["mean", "representative"] = Field(
        "mean", description="router row of a cluster: the same mean, or that of the member most visited"
    )

    def score(self, problem: ExpertProblem) -> Tensor:
        return self._clustering(problem).heights()

    def regroup(self, problem: ExpertProblem, kept: Tensor) -> Survivors:
        import torch

        if len(kept) == problem.count:
            return Survivors(kept)
        visits = problem.observed.counts
        clusters = self._clustering(problem).clusters(len(kept))
        chosen = nearest(clusters, torch.zeros(problem.count), visits)
        mix = averages(clusters, visits)
        return stand_for(clusters, chosen, mix, mix if self.router == "mean" else None)

    def _clustering(self, problem: ExpertProblem) -> Clustering:
        return cluster_by(output_distance(problem), self.linkage)
