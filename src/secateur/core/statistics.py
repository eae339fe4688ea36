"""What calibration tells a method about one matrix or kind of unit: plain tensors, no model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKWARD", "ROUTED", "InputStatistics", "RoutingStatistics", "Statistic"]

Statistic = Literal[
    "second_moment",
    "mean",
    "hessian",
    "activity",
    "gradient",
    "taylor_vector",
    "taylor_first",
    "taylor_sample",
    "taylor_second",
    "taylor_mixed",
    "routing",
    "expert_norms",
    "expert_means",
    "expert_losses",
]

BACKWARD: frozenset[Statistic] = frozenset(
    {"gradient", "taylor_vector", "taylor_first", "taylor_sample", "taylor_second", "taylor_mixed"}
)
"""What comes from gradients of the loss; the rest is seen on the way forward."""

ROUTED: frozenset[Statistic] = frozenset({"routing", "expert_norms", "expert_means", "expert_losses"})
"""What is seen of the experts of a block as a whole; the rest is seen where a matrix takes its input."""


@dataclass
class InputStatistics:
    """Sums over the calibration tokens that reached one matrix input.

    Everything is a plain sum over valid (not padded) tokens, so two parts of a calibration set add up;
    each method applies the normalisation of its paper.

    Attributes:
        columns: width C of the input.
        tokens: tokens summed over.
        sequences: calibration sequences they came from.
        second_moment: (C,) float64, sum over t of x_t^2.
        mean: (C,) float64, sum over t of x_t (divide by `tokens` for the mean).
        hessian: (C, C) float32, sum over t of x_t x_t^T.
        activity: (C,) float64, sum over sequences of the squared mean over their tokens of |x_t|.
        cache: what a method derived from these and the next matrix with the same input can use again.
    """

    columns: int
    tokens: int = 0
    sequences: int = 0
    second_moment: Tensor | None = None
    mean: Tensor | None = None
    hessian: Tensor | None = None
    activity: Tensor | None = None
    cache: dict[object, object] = field(default_factory=dict, repr=False)

    def input_norms(self) -> Tensor:
        """(C,) float32: sqrt of Wanda's running mean over sequences of the token sums of x_j^2
        (one-shot-baselines, section 2.0)."""
        if self.second_moment is None:
            raise ValueError("the second moment was not observed")
        return (self.second_moment / max(self.sequences, 1)).sqrt().float()

    @property
    def never_reached(self) -> bool:
        """No token, or only zeros, arrived at this input."""
        if self.tokens == 0:
            return True
        energy = self.second_moment
        if energy is None and self.hessian is not None:
            energy = self.hessian.diagonal()
        return energy is not None and not bool((energy > 0).any())


@dataclass
class RoutingStatistics:
    """Sums over the calibration tokens that reached the router of one block with n experts, k a token.

    Attributes:
        tokens: tokens summed over.
        counts: (n,) float64, tokens that visited each expert.
        coactivation: (n, n) float64, tokens that visited both; zero on the diagonal. Rows sum to
            (k - 1) * counts.
        probabilities: (n,) float64, sum over the tokens that visited an expert of its probability among all n
            (softmax or sigmoid of the logits, before top-k renormalisation).
        gates: (n,) float64, the same sum of the weight that its output was multiplied by.
        norms: (n,) float64, sum over the tokens that visited an expert of gate * ||output||_2
            (`expert_norms`).
        means: (n, d) float64, sum over ALL tokens of the output of each expert (`expert_means`).
        losses: (n, n) float64, sum over the tokens that visited both of the inner product of what the two add
            to the output, weights included (`expert_losses`). Summed over a set of experts, rows and columns,
            it is the squared change of the block's output when the weights of all of them are zero.
        ratios: (tokens, k - 1) float16, probability of the second, third, ... expert of a token over that of
            its first.
    """

    tokens: int
    counts: Tensor
    coactivation: Tensor
    probabilities: Tensor
    gates: Tensor
    ratios: Tensor
    norms: Tensor | None = None
    means: Tensor | None = None
    losses: Tensor | None = None

    def part(self, rows: Tensor) -> RoutingStatistics:
        """Of these experts alone, int64."""
        return replace(
            self,
            counts=self.counts[rows],
            coactivation=self.coactivation[rows][:, rows],
            probabilities=self.probabilities[rows],
            gates=self.gates[rows],
            norms=None if self.norms is None else self.norms[rows],
            means=None if self.means is None else self.means[rows],
            losses=None if self.losses is None else self.losses[rows][:, rows],
        )
