"""Orders of the input channels that let an N:M pattern keep more of the score.

From "Plug-and-Play" (one-shot-baselines, section 2.5). A stock checkpoint holds such an order only where
it can be folded, exactly, into whatever produces the inputs: the channels between gate/up and down, or
between v and o within a head. Elsewhere the inputs feed several matrices, or a norm and a residual.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.core.pattern import InputOrder, Pattern
from secateur.core.selection import select_groups

__all__ = ["best_permutation", "refine", "retained", "snake"]


def best_permutation(scores: Tensor, pattern: Pattern, algorithm: InputOrder) -> Tensor:
    """(in,) int64 order of the inputs; never retains less than the stored order, which wins a draw.

    Args:
        scores: (out, in) importance of each weight, not negative.
        pattern: N:M, with in a multiple of M.
        algorithm: `snake` deals the channels out; `hungarian` then refines the deal.
    """
    best = torch.arange(scores.shape[1], device=scores.device)
    if algorithm == "none":
        return best
    dealt = snake(scores, pattern.of)
    candidates = [dealt] if algorithm == "snake" else [dealt, refine(scores, dealt, pattern)]
    for candidate in candidates:
        if retained(scores, pattern, candidate) > retained(scores, pattern, best):
            best = candidate
    return best


def retained(scores: Tensor, pattern: Pattern, permutation: Tensor) -> float:
    """Sum of the scores that stay when the columns stand in this order."""
    ordered = scores[:, permutation]
    return float((ordered * select_groups(ordered, pattern)).sum(dtype=torch.float64))


def snake(scores: Tensor, width: int) -> Tensor:
    """Deal the channels, best total first, to the groups of `width`, turning round at either end."""
    order = scores.sum(0, dtype=torch.float64).argsort(descending=True, stable=True)
    rounds = order.view(width, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def refine(scores: Tensor, permutation: Tensor, pattern: Pattern, *, groups_at_once: int = 256) -> Tensor:
    """One sweep over the M positions: the channels there are assigned anew to the groups, optimally.

    Each assignment contains the present one, so the retained score never falls.

    Args:
        scores: (out, in).
        permutation: (in,) order to start from.
        pattern: N:M.
        groups_at_once: groups solved together; the cost grows with the square of it.
    """
    groups = permutation.view(-1, pattern.of).clone()
    for position in range(pattern.of):
        for part in torch.split(groups, groups_at_once):  # views: what is assigned lands in `groups`
            gains = _gains(scores, part, position, pattern.keep)
            _, chosen = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
            part[:, position] = part[torch.as_tensor(chosen, device=part.device), position]
    return groups.flatten()


def _gains(scores: Tensor, groups: Tensor, position: int, keep: int) -> Tensor:
    """(G, G) float64: what group i would retain more with the channel at `position` of group j.

    A newcomer replaces the `keep`-th best of the others, in every row where it is larger:
    sum of relu(v - b) = (sum |v - b| + sum (v - b)) / 2, so one L1 distance matrix serves all pairs.
    """
    others = groups[:, [column for column in range(groups.shape[1]) if column != position]]
    bars = scores[:, others].topk(keep, dim=-1).values[..., -1].T.contiguous()
    newcomers = scores[:, groups[:, position]].T.contiguous()
    distances = torch.cdist(bars, newcomers, p=1).double()
    return (distances + newcomers.double().sum(1) - bars.double().sum(1, keepdim=True)) / 2
