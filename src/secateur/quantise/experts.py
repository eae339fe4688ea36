"""Which experts get more bits: how often they are visited, what they weigh, what rounding does to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.quantise.grid import rounded

__all__ = ["rounded_stack", "rounding_losses", "shares"]


def shares(counts: Tensor) -> Tensor:
    """(n,) float64 of the whole; all alike where nothing was counted (mc-moe, section 2.1)."""
    total = counts.double().sum()
    return counts.double() / total if total > 0 else torch.full_like(counts.double(), 1 / len(counts))


def rounding_losses(
    counts: Tensor, probabilities: Tensor, errors: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """(n, levels) float64: phi^alpha * w^beta * eps^gamma of each expert and bits (mc-moe, section 2.3).

    An expert that no token visited loses nothing at any level, so that it takes the lowest.

    Args:
        counts: (n,) tokens that visited each expert.
        probabilities: (n,) sum over them of its probability among all experts.
        errors: (n, levels) of `expert_errors`.
    """
    significance = shares(counts).pow(alpha) * shares(probabilities).pow(beta)
    losses = significance[:, None] * errors.double().pow(gamma)
    return losses.masked_fill(counts[:, None] == 0, 0.0)


def rounded_stack(stacks: Mapping[str, Tensor], bits: int, group: int) -> dict[str, Tensor]:
    """Stacked matrices of all experts, (n, out, in) each, plainly rounded in groups along the input; in their
    own dtype."""
    found = {}
    for name, stack in stacks.items():
        flat = rounded(stack.float().flatten(0, 1), bits, group)
        found[name] = flat.view(stack.shape).to(stack.dtype)
    return found
