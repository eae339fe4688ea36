"""Experts by what the output of their block loses without them: what a cheaper method is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.errors import RecipeError
from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.experts.base import ExpertMethod, ExpertProblem, Survivors, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReconExperts"]

MOST = 16
"""Experts of which all subsets are tried."""


@register
class ReconExperts(ExpertMethod):
    """||M(x) - M(x without S)||_F over the calibration tokens, for sets S of experts whose weights are zero
    while the router stays (stun, sections 2.3 and 2.8, `recon` and `exhaustive`).

    One pass gives the loss of every set: it is a quadratic form in who goes. Losses are relative to the
    squared output of the experts, so that blocks can be compared.
    """

    id: ClassVar[str] = "recon-experts"
    paper: ClassVar[Paper | None] = Paper(
        "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024, "2409.06211"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing", "expert_losses"})
    comparable: ClassVar[bool] = True

    search: Literal["greedy", "each", "exhaustive"] = Field(
        "greedy",
        description="greedy: one after the other, losses anew after each; each: by their own loss alone; "
        f"exhaustive: the best of all sets, of at most {MOST} experts",
    )

    def check(self, counts: Sequence[int]) -> None:
        if self.search == "exhaustive" and max(counts) > MOST:
            raise RecipeError(
                f"search=exhaustive with {max(counts)} experts", f"at most {MOST}", "use -O search=greedy"
            )

    def score(self, problem: ExpertProblem) -> Tensor:
        """What the removal of one more adds to the loss, never less than that of one before it: the k
        smallest are what the set of k costs that `regroup` takes away."""
        import torch

        losses = _relative(problem)
        if self.search == "each":
            return losses.diagonal().clone()
        totals = [_lost(losses, gone) for gone in self._sets(losses)]
        return torch.tensor(totals, dtype=torch.float64).diff().cummax(0).values

    def regroup(self, problem: ExpertProblem, kept: Tensor) -> Survivors:
        import torch

        if self.search == "each":
            return Survivors(kept)
        gone = self._sets(_relative(problem))[problem.count - len(kept)]
        return Survivors(torch.tensor([one for one in range(problem.count) if one not in gone]))

    def _sets(self, losses: Tensor) -> list[Sequence[int]]:
        """Who goes, of every number from none to all."""
        numbers = range(len(losses) + 1)
        if self.search == "exhaustive":
            return [_best(losses, number) for number in numbers]
        order = _greedy(losses)
        return [order[:number] for number in numbers]


def _relative(problem: ExpertProblem) -> Tensor:
    """(n, n) float64: summed over a set, rows and columns, what the block loses without it."""
    losses = problem.observed.losses
    if losses is None:
        raise ValueError("the losses of the experts were not observed")
    return losses.double() / losses.double().sum().clamp_min(1e-30)


def _greedy(losses: Tensor) -> list[int]:
    """The order in which experts go, each the one that then costs least; of equal ones the first."""
    import torch

    gone: list[int] = []
    while len(gone) < len(losses):
        rises = losses.diagonal() + 2 * losses[:, gone].sum(1)
        rises[gone] = torch.inf
        gone.append(int(rises.argmin()))
    return gone


def _best(losses: Tensor, number: int) -> tuple[int, ...]:
    """The set of so many experts that costs least; of equal ones the first."""
    import torch

    sets = list(combinations(range(len(losses)), number))
    if number == 0:
        return ()
    chosen = torch.zeros(len(sets), len(losses), dtype=torch.float64).scatter_(1, torch.tensor(sets), 1.0)
    return sets[int(((chosen @ losses) * chosen).sum(1).argmin())]


def _lost(losses: Tensor, gone: Sequence[int]) -> float:
    rows = list(gone)
    return float(losses[rows][:, rows].sum())
