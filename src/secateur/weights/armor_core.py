"""One group of the sparse core in every block at once: its best support and the best values there."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from secateur.core.pattern import Pattern
from secateur.weights.armor_steps import Factors, pull
from secateur.weights.nowag import Normalised

__all__ = ["CoreStep", "Select"]

Select = Literal["gradient", "greedy", "random"]

MOST_SUPPORTS = 128
"""N:M groups with more supports are improved four entries at a time."""
FEW = 4
RIDGE = 1e-9
TINY = 1e-30


class _Group(NamedTuple):
    """One group in each of the P x Q blocks: `at` reaches its g entries in a (P, a, Q, b) view."""

    rows: Tensor
    columns: Tensor

    @property
    def at(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        blocks = [torch.arange(size, device=self.rows.device) for size in self.rows.shape]
        return blocks[0][:, None, None], self.rows[..., None], blocks[1][None, :, None], self.columns


class CoreStep:
    """The sparse-core step (armor, section 2.5 b).

    With N:M a group is M inputs of one row, and all supports of N are tried. Where those are too many, and
    in cores without groups, it is two kept and two dropped entries of one row (of one M, or of one block),
    of which as many stay as were kept: the count of every group, row and matrix stays.

    Args:
        pattern: of the core.
        select: how the group of a block is chosen: drawn by the gradient, the largest gradient, or any.
        generator: on the CPU.
    """

    def __init__(self, pattern: Pattern, select: Select, generator: torch.Generator | None) -> None:
        self._select, self._generator = select, generator
        self._whole = pattern.kind == "n:m" and comb(pattern.of, pattern.keep) <= MOST_SUPPORTS
        self._width = pattern.of if pattern.kind == "n:m" else 0
        self._keep = pattern.keep

    def __call__(self, factors: Factors, whole: Normalised, times: int) -> Tensor:
        """Do that so many times; returns what the squared error fell by, a float64 scalar."""
        curvature = (factors.right * whole.energy.view(len(factors.right), 1, -1)) @ factors.right.mT
        residual = whole.matrix - factors.product()
        fell = residual.new_zeros((), dtype=torch.float64)
        for _ in range(times):
            pulls = _blocks(pull(factors, whole, residual), factors)
            group = self._choose(pulls, factors, curvature)
            fell += self._improve(group, pulls, factors, curvature, residual)
        return fell

    def _choose(self, pulls: Tensor, factors: Factors, curvature: Tensor) -> _Group:
        """Sampled in proportion to the L1 norm of the gradient, which needs no sorting."""
        P, a, Q, b = pulls.shape
        width = self._width or b
        scores = pulls.abs().view(P, a, Q, b // width, width).sum(-1).transpose(1, 2).flatten(2)
        if self._select == "random":
            scores = torch.ones_like(scores)
        picked = scores.argmax(-1) if self._select == "greedy" else self._sample(scores)
        regions = b // width
        first = (picked % regions)[..., None] * width
        group = _Group(picked // regions, first + torch.arange(width, device=first.device))
        return group if self._whole else _swappable(group, pulls, factors, curvature)

    def _sample(self, scores: Tensor) -> Tensor:
        """(P, Q) an index of the last axis, in proportion to its score."""
        totals = scores.double().cumsum(-1)
        drawn = torch.rand((*scores.shape[:-1], 1), dtype=torch.float64, generator=self._generator)
        found = torch.searchsorted(totals, drawn.to(totals.device) * totals[..., -1:], right=True)
        return found.squeeze(-1).clamp_max(scores.shape[-1] - 1)

    def _improve(
        self, group: _Group, pulls: Tensor, factors: Factors, curvature: Tensor, residual: Tensor
    ) -> Tensor:
        """Put the best support and values in place, and keep `residual` that of the factors.

        The squared error as a function of the values s of one group is s H s - 2 u s and a constant, with
        H = |A's column|^2 (B energy B^T) on its entries and u = pull + H s at the present s.
        """
        index = group.at
        core, kept = _blocks(factors.core, factors), _blocks(factors.kept, factors)
        old, present = core[index], kept[index]
        reach = factors.left.square().sum(1)[index[0], index[1]].double()
        hessian = _square(curvature, group).double() * reach[..., None]
        wanted = pulls[index].double() + (hessian @ old.double()[..., None]).squeeze(-1)
        supports, values, costs = self._candidates(hessian, wanted)
        costs.masked_fill_(supports.sum(-1) != present.sum(-1, keepdim=True), torch.inf)
        before, (after, best) = _cost(hessian, wanted, old.double()), costs.min(-1)
        better = after < before
        chosen = values.gather(2, best[..., None, None].expand(*best.shape, 1, values.shape[-1])).squeeze(2)
        new = torch.where(better[..., None], chosen.float(), old)
        core[index] = new
        kept[index] = torch.where(better[..., None], supports[best], present)
        inner = ((new - old)[..., None] * factors.right[index[2], index[3]]).sum(2)
        outer = factors.left.mT[index[0].squeeze(-1), group.rows]
        _blocks(residual, factors).sub_(outer.transpose(1, 2)[..., None] * inner[:, None])
        return (before - after).clamp_min(0).sum()

    def _candidates(self, hessian: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(C, g) bool, all supports that may be tried; (P, Q, C, g) their best values; (P, Q, C) the cost."""
        size = wanted.shape[-1]
        counts = (self._keep,) if self._whole else range(1, size + 1)
        supports, values, costs = [], [], []
        for count in counts:
            chosen = torch.tensor(list(combinations(range(size), count)), device=wanted.device)
            best, cost = _on_supports(hessian, wanted, chosen)
            supports.append(torch.nn.functional.one_hot(chosen, size).sum(1).bool())
            values.append(best)
            costs.append(cost)
        return torch.cat(supports), torch.cat(values, 2), torch.cat(costs, 2)


def _blocks(matrix: Tensor, factors: Factors) -> Tensor:
    """A (P a, Q b) matrix seen as (P, a, Q, b)."""
    return matrix.view(*factors.left.shape[:2], *factors.right.shape[:2])


def _square(curvature: Tensor, group: _Group) -> Tensor:
    """(P, Q, g, g) of (Q, b, b): what the entries of a group share."""
    block = group.at[2][..., None]
    return curvature[block, group.columns[..., :, None], group.columns[..., None, :]]


def _swappable(group: _Group, pulls: Tensor, factors: Factors, curvature: Tensor) -> _Group:
    """Of each group the kept entries that are missed least and the dropped ones that are missed most, by
    turns."""
    index = group.at
    kept = _blocks(factors.kept, factors)[index]
    bends = curvature.diagonal(dim1=-2, dim2=-1)[index[2], index[3]]
    missed = torch.where(kept, _blocks(factors.core, factors)[index].square() * bends, -pulls[index].abs())
    places = [missed.masked_fill(~side, torch.inf).argsort(-1).argsort(-1) for side in (kept, ~kept)]
    turns = 2 * torch.where(kept, places[0], places[1]) + kept
    columns = turns.topk(min(FEW, turns.shape[-1]), largest=False).indices
    return group._replace(columns=group.columns.gather(-1, columns))


def _on_supports(hessian: Tensor, wanted: Tensor, supports: Tensor) -> tuple[Tensor, Tensor]:
    """(P, Q, C, g) values that minimise s H s - 2 u s on supports (C, k), and (P, Q, C) that minimum."""
    scale = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + TINY
    inside = wanted[..., supports]
    system = hessian[..., supports[:, :, None], supports[:, None]]
    system.diagonal(dim1=-2, dim2=-1).add_(RIDGE * scale)
    solved = _eliminate(system, inside)
    values = wanted.new_zeros(*solved.shape[:-1], wanted.shape[-1])
    values.scatter_(-1, supports.expand_as(solved), solved)
    return values, -(inside * solved).sum(-1)


def _eliminate(systems: Tensor, rights: Tensor) -> Tensor:
    """Solve many tiny positive definite systems (..., g, g) x = (..., g), pivot by pivot for all at once:
    several times as fast as one factorisation each."""
    size = systems.shape[-1]
    rows = torch.cat([systems, rights[..., None]], -1).flatten(0, -3).permute(1, 2, 0).contiguous()
    for pivot in range(size):
        later = rows[:, pivot + 1 :]
        scaled = later[pivot] / rows[pivot, pivot]
        later.addcmul_(rows[:, pivot, None], scaled[None], value=-1)
        later[pivot] = scaled
    return rows[:, -1].T.reshape(rights.shape)


def _cost(hessian: Tensor, wanted: Tensor, values: Tensor) -> Tensor:
    """s H s - 2 u s."""
    bent = (hessian @ values[..., None]).squeeze(-1)
    return ((bent - 2 * wanted) * values).sum(-1)
