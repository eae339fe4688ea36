"""How far apart the experts of a block are: (n, n) float64, symmetric, zero on the diagonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.core.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.experts.base import ExpertProblem

__all__ = ["coactivation_distance", "output_distance", "router_cosine", "router_distance"]


def router_distance(problem: ExpertProblem, *, scaled: bool = True) -> Tensor:
    """||W_i - W_j|| of the rows of the router, with the bias as one more column (stun, sections 2.1 and 5).

    Args:
        scaled: divided by ||W||_F of the whole router, so that blocks can be compared.
    """
    rows = _router_rows(problem)
    apart = _apart(rows)
    return apart / rows.norm().clamp_min(1e-30) if scaled else apart


def router_cosine(problem: ExpertProblem) -> Tensor:
    """1 - cos of the same rows: their norms do not count."""
    rows = _router_rows(problem)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return _apart(rows).square() / 2


def coactivation_distance(problem: ExpertProblem) -> Tensor:
    """-a_ij / mean |a| over the whole matrix, diagonal included (stun, section 2.1): not above zero.

    Raises:
        RecipeError: tokens that visit one expert each.
    """
    if problem.top_k < 2:
        raise RecipeError(
            f"co-activation in {problem.name}, where a token visits {problem.top_k} expert",
            "at least two",
            "use -O similarity=router",
        )
    together = problem.observed.coactivation.double()
    return -together / together.mean().clamp_min(1e-30)


def output_distance(problem: ExpertProblem) -> Tensor:
    """Between the mean outputs of the experts over all tokens, in units of the mean such distance."""
    routing = problem.observed
    if routing.means is None:
        raise ValueError("the outputs of the experts were not observed")
    apart = _apart(routing.means.double() / max(routing.tokens, 1))
    pairs = max(problem.count * (problem.count - 1), 1)
    return apart / (apart.sum() / pairs).clamp_min(1e-30)


def _router_rows(problem: ExpertProblem) -> Tensor:
    """(n, d) or (n, d + 1) float64."""
    import torch

    rows = problem.router.double()
    return rows if problem.bias is None else torch.cat([rows, problem.bias.double()[:, None]], dim=1)


def _apart(rows: Tensor) -> Tensor:
    """Euclidean distances from differences: equal rows are exactly zero apart."""
    import torch

    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
