"""DSnoT: swap dropped and kept weights until the mean output is right again, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.method import Paper
from secateur.core.statistics import InputStatistics, Statistic
from secateur.weights.base import METHODS, OtherMethod, Problem, Solution, WeightMethod, input_norms, register

__all__ = ["Dsnot"]


@register
class Dsnot(WeightMethod):
    """Prune and regrow on top of another mask (one-shot-baselines, section 2.9).

    With D_j = W_j * mean_j a row is off by eps = sum of D over what it dropped. Each cycle takes back the
    dropped weight that moves eps most for its variance, and drops the least important kept one (by Wanda's
    score) that moves it the same way. All rows run at once. A row ends with the first swap that would not
    lower |eps|; the published code goes on to and fro around zero (`overshoot`), which in narrow matrices
    replaces good weights for nothing. The weights themselves are those of the dense model, whatever method
    chose the first mask.
    """

    id: ClassVar[str] = "dsnot"
    paper: ClassVar[Paper | None] = Paper(
        "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", 2023, "2310.08915"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "mean"})

    base: OtherMethod = Field("wanda", min_length=1, description="method of the first mask")
    cycles: int = Field(50, ge=0, description="most swaps in a row")
    threshold: float = Field(0.1, ge=0, description="|eps| at which a row is left alone")
    power: float = Field(1.0, ge=0, description="exponent of the input variance in the regrowing order")
    overshoot: bool = Field(False, description="swap on when |eps| would grow, as the published code does")

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.needs | METHODS.get(self.base)().statistics

    def score(self, problem: Problem) -> Tensor:
        """That of the base, for a choice across matrices; the swaps keep the count of each row."""
        return METHODS.get(self.base)().score(problem)

    def prune(self, problem: Problem) -> Solution:
        start = METHODS.get(self.base)().prune(problem)
        mean, variance = _moments(problem.inputs)
        effect = problem.weight * mean
        rows = _Rows(
            effect=effect,
            appeal=effect / variance.pow(self.power),
            importance=problem.weight.abs() * input_norms(problem.inputs),
            kept=start.kept,
        )
        group = problem.pattern.of if problem.pattern.kind == "n:m" else 0
        chooser = _InGroup(rows, group) if group else _InRow(rows, self.cycles)
        kept, before, after = self._swap(rows, chooser)
        notes = {
            "mean_error_before": float(before.abs().mean()),
            "mean_error_after": float(after.abs().mean()),
        }
        return Solution.of(problem.weight, kept, notes=notes, fallbacks=start.fallbacks)

    def _swap(self, rows: _Rows, chooser: _InRow | _InGroup) -> tuple[Tensor, Tensor, Tensor]:
        """The mask after the swaps, and (out,) eps before and after.

        A regrown weight of positive effect leaves eps smaller, and so does a dropped one of negative
        effect: with eps > 0 the first comes from side 0 and the second from side 1, with eps < 0 the
        other way round.
        """
        queue = _Queue(-rows.appeal.abs(), ~rows.kept, rows.effect, self.cycles)
        row = torch.arange(len(rows.kept), device=rows.kept.device)
        first = eps = (rows.effect * ~rows.kept).sum(1)
        kept, alive = rows.kept.clone(), torch.ones_like(eps, dtype=torch.bool)
        for _ in range(self.cycles):
            side = (eps <= 0).long()
            regrown, left = queue.peek(side)
            dropped, fits = chooser.find(1 - side, regrown)
            after = eps + rows.effect[row, dropped] - rows.effect[row, regrown]
            alive = alive & left & (eps.abs() > self.threshold)
            if not self.overshoot:
                alive = alive & (~fits | (after.abs() < eps.abs()))
            swapped = alive & fits
            queue.advance(side, alive)  # a candidate without a partner is passed over
            chooser.take(1 - side, dropped, swapped)
            kept[row, regrown] |= swapped
            kept[row, dropped] &= ~swapped
            eps = torch.where(swapped, after, eps)
            if not bool(alive.any()):  # nearly all rows end within a few cycles
                break
        return kept, first, eps


def _moments(inputs: InputStatistics) -> tuple[Tensor, Tensor]:
    """(in,) mean over sequences of the token sums, and variance over tokens."""
    if inputs.mean is None or inputs.second_moment is None:
        raise ValueError("mean and second moment were not observed")
    tokens = max(inputs.tokens, 1)
    variance = inputs.second_moment / tokens - (inputs.mean / tokens).square()
    floor = max(float(variance.max()) * 1e-12, 1e-30)  # constant inputs must not divide by zero
    return (inputs.mean / max(inputs.sequences, 1)).float(), variance.clamp_min(floor).float()


@dataclass
class _Rows:
    """What the swaps look at, all (out, in).

    Attributes:
        effect: contribution of each weight to the mean output of its row.
        appeal: effect over variance; the extremes are regrown first.
        importance: Wanda's score; the lowest are dropped first.
        kept: the mask to start from.
    """

    effect: Tensor
    appeal: Tensor
    importance: Tensor
    kept: Tensor


class _Queue:
    """The first candidates of every row in order, for rows that must go down and rows that must go up."""

    def __init__(self, order: Tensor, allowed: Tensor, effect: Tensor, length: int) -> None:
        """`order`: (out, in), lowest first; `allowed`: who may be taken; `effect`: its sign is the side."""
        length = max(min(length, order.shape[1]), 1)
        sides = [order.masked_fill(~(allowed & side), torch.inf) for side in (effect > 0, effect < 0)]
        found = [side.topk(length, dim=-1, largest=False, sorted=True) for side in sides]
        self.indices = torch.stack([side.indices for side in found])
        self.usable = torch.stack([side.values < torch.inf for side in found])
        self.next = torch.zeros(self.indices.shape[:2], dtype=torch.int64, device=order.device)
        self._row = torch.arange(order.shape[0], device=order.device)

    def peek(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) index of the next candidate on `side` (0: positive effect), and whether there is one."""
        place = self.next[side, self._row]
        inside = place.clamp_max(self.indices.shape[-1] - 1)
        return self.indices[side, self._row, inside], self.usable[side, self._row, inside] & (place == inside)

    def advance(self, side: Tensor, rows: Tensor) -> None:
        self.next[side, self._row] += rows


class _InRow:
    """Whatever weight of the row is least important goes."""

    def __init__(self, rows: _Rows, cycles: int) -> None:
        self._queue = _Queue(rows.importance, rows.kept, rows.effect, cycles)

    def find(self, side: Tensor, regrown: Tensor) -> tuple[Tensor, Tensor]:
        return self._queue.peek(side)

    def take(self, side: Tensor, dropped: Tensor, rows: Tensor) -> None:
        self._queue.advance(side, rows)


class _InGroup:
    """The least important kept weight of the regrown one's own N:M group goes."""

    def __init__(self, rows: _Rows, width: int) -> None:
        self._width = width
        self._free = rows.kept.clone()
        self._rows = rows
        self._row = torch.arange(len(rows.kept), device=rows.kept.device)

    def find(self, side: Tensor, regrown: Tensor) -> tuple[Tensor, Tensor]:
        start = regrown - regrown % self._width
        members = start[:, None] + torch.arange(self._width, device=start.device)
        effect = self._rows.effect.gather(1, members)
        right_sign = torch.where(side[:, None] == 0, effect > 0, effect < 0)
        allowed = self._free.gather(1, members) & right_sign
        lowest, place = self._rows.importance.gather(1, members).masked_fill(~allowed, torch.inf).min(1)
        return start + place, lowest < torch.inf

    def take(self, side: Tensor, dropped: Tensor, rows: Tensor) -> None:
        self._free[self._row, dropped] &= ~rows
