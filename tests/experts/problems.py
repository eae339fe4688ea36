"""Made-up experts of one block, and what was observed of them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.statistics import RoutingStatistics
from secateur.experts.base import ExpertProblem

TOKENS, K = 200, 2


def make_routing(routes: Tensor, count: int, width: int = 8, seed: int = 0) -> RoutingStatistics:
    """Of (tokens, k) routes, all with equal weights; outputs are random."""
    generator = torch.Generator().manual_seed(seed)
    visited = torch.zeros(len(routes), count, dtype=torch.float64).scatter_(1, routes, 1.0)
    together = visited.T @ visited
    counts = together.diagonal().clone()
    outputs = counts[:, None] * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return RoutingStatistics(
        tokens=len(routes),
        counts=counts,
        coactivation=together.fill_diagonal_(0),
        probabilities=counts / 4,
        gates=counts / routes.shape[1],
        ratios=torch.ones(len(routes), routes.shape[1] - 1).half(),
        norms=counts * torch.rand(count, generator=generator, dtype=torch.float64),
        means=len(routes) * torch.randn(count, width, generator=generator, dtype=torch.float64),
        losses=outputs @ outputs.T,
    )


def make_problem(count: int = 8, *, visited: int | None = None, seed: int = 0) -> ExpertProblem:
    """Random experts, of which the first `visited` see tokens, each another number of them."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(TOKENS, visited or count, generator=generator)
    routes = (chances + torch.linspace(0, 0.5, visited or count)).topk(K, dim=1).indices
    return ExpertProblem(
        name="0.experts",
        top_k=K,
        router=torch.randn(count, 16, generator=generator),
        bias=None,
        weights={
            "gate_up": torch.randn(count, 12, 8, generator=generator),
            "down": torch.randn(count, 8, 6, generator=generator),
        },
        routing=make_routing(routes, count, seed=seed),
        generator=torch.Generator().manual_seed(seed),
    )
