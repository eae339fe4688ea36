"""Made-up experts of one block, and what was observed of them."""

from __future__ import annotations

from dataclasses import replace

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
    return RoutingStatistics(
        tokens=len(routes),
        counts=counts,
        coactivation=together.fill_diagonal_(0),
        probabilities=counts / 4,
        gates=counts / routes.shape[1],
        ratios=torch.ones(len(routes), routes.shape[1] - 1).half(),
        norms=counts * torch.rand(count, generator=generator, dtype=torch.float64),
        means=len(routes) * torch.randn(count, width, generator=generator, dtype=torch.float64),
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


def take(problem: ExpertProblem, order: Tensor) -> ExpertProblem:
    """The problem with the experts in another order, or some of them several times."""
    seen = problem.observed
    return replace(
        problem,
        router=problem.router[order],
        bias=None if problem.bias is None else problem.bias[order],
        weights={name: stack[order] for name, stack in problem.weights.items()},
        routing=replace(
            seen,
            counts=seen.counts[order],
            coactivation=seen.coactivation[order][:, order],
            probabilities=seen.probabilities[order],
            gates=seen.gates[order],
            norms=None if seen.norms is None else seen.norms[order],
            means=None if seen.means is None else seen.means[order],
        ),
    )
