"""The numbers that a few bits can stand for: evenly spaced ones, a grid for every row and group of columns.

Code c of a group means low + scale * c. One bit is the same with two numbers, minus and plus the mean
magnitude (mc-moe, section 2.4). Scale and low are what is stored, float16; codes are chosen for just these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import NumericsError

__all__ = ["GROUP", "METADATA", "STEPS", "Grid", "bits_a_weight", "fit", "nearest", "rounded"]

GROUP = 128
METADATA = torch.float16
STEPS = 101
"""Sizes of a grid that the search tries, between 0.9 and 1.1 times the range of the weights."""
EXPONENT = 2.4
"""Of the errors that the search adds up."""


@dataclass(frozen=True)
class Grid:
    """The grids of a matrix.

    Attributes:
        bits: of a code.
        group: columns that share a grid; the last group of a row is what is left.
        scale: (rows, groups) float32, with values of float16.
        low: (rows, groups) float32, with values of float16: what code 0 means.
    """

    bits: int
    group: int
    scale: Tensor
    low: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """(rows, columns) uint8: the nearest code of each weight."""
        scale, low = self._wide(weight.shape[1])
        return nearest(weight.float(), scale, low, self.bits).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """(rows, columns) float32 that the codes mean."""
        weight = codes.float()
        whole = codes.shape[1] // self.group
        groups, rest = weight[:, : whole * self.group], weight[:, whole * self.group :]
        if whole:
            scale, low = self.scale[:, :whole, None], self.low[:, :whole, None]
            groups.view(len(groups), whole, self.group).mul_(scale).add_(low)
        if rest.shape[1]:
            rest.mul_(self.scale[:, whole:]).add_(self.low[:, whole:])
        return weight

    def rows(self, start: int, stop: int) -> Grid:
        """That of some of the rows."""
        return Grid(self.bits, self.group, self.scale[start:stop], self.low[start:stop])

    def _wide(self, columns: int) -> tuple[Tensor, Tensor]:
        wide = (one.repeat_interleave(self.group, 1)[:, :columns] for one in (self.scale, self.low))
        return next(wide), next(wide)


def fit(weight: Tensor, bits: int, group: int, steps: int = 0) -> Grid:
    """A grid over the range of each group, or the best of `steps` sizes of it.

    Args:
        weight: (rows, columns) float32.
        bits: 1 to 8.
        group: columns that share a grid.
        steps: sizes tried between 0.9 and 1.1; 0 takes the range as it is (plain rounding).

    Raises:
        NumericsError: a weight that float16 cannot reach.
    """
    found = [_fit(part, bits, steps) for part in _groups(weight, group)]
    scale, low = (torch.cat([one[i] for one in found], dim=1) for i in range(2))
    if not bool(torch.isfinite(scale).all() and torch.isfinite(low).all()):
        raise NumericsError("weights beyond the reach of float16, in which the scales of groups are stored")
    return Grid(bits, group, scale, low)


def nearest(weight: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, as float32; everything broadcasts. A grid of one point has code 0."""
    step = torch.where(scale > 0, scale, torch.inf)
    if bits == 1:  # exactly the sign, whatever the middle between the two rounds to
        return (weight >= 0).float() * torch.isfinite(step)
    return ((weight - low) / step).round_().clamp_(0, 2**bits - 1)


def rounded(weight: Tensor, bits: int, group: int, steps: int = 0) -> Tensor:
    """(rows, columns) float32: plain rounding to the nearest, the weights of a group by themselves."""
    grid = fit(weight, bits, group, steps)
    return grid.values(grid.codes(weight))


def bits_a_weight(bits: int, group: int, columns: int) -> float:
    """What a weight takes with its share of scale and low, in rows of whole bytes."""
    numbers = 1 if bits == 1 else 2
    per_row = 8 * -(-columns * bits // 8) + numbers * 8 * METADATA.itemsize * -(-columns // group)
    return per_row / columns


def _groups(weight: Tensor, group: int) -> Iterator[Tensor]:
    """(rows, groups, width): the whole groups, then what is left."""
    rows, columns = weight.shape
    whole = columns // group * group
    if whole:
        yield weight[:, :whole].reshape(rows, -1, group)
    if columns > whole:
        yield weight[:, whole:, None].transpose(1, 2)


def _fit(weight: Tensor, bits: int, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and low, (rows, groups) each, of (rows, groups, width)."""
    if bits == 1:
        mean = _stored(weight.abs().mean(-1))
        return 2 * mean, -mean
    least, most = weight.aminmax(dim=-1)
    best = _between(least, most, bits)
    if steps > 1:
        error = _error(weight, best, bits)
        for size in torch.linspace(0.9, 1.1, steps).tolist():
            tried = _between(size * least, size * most, bits)
            other = _error(weight, tried, bits)
            better = other < error
            error = torch.where(better, other, error)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
    return best


def _between(least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _stored((most - least) / (2**bits - 1)), _stored(least)


def _error(weight: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    scale, low = grid[0][..., None], grid[1][..., None]
    new = nearest(weight, scale, low, bits).mul_(scale).add_(low)
    return new.sub_(weight).abs_().pow_(EXPONENT).sum(-1)


def _stored(numbers: Tensor) -> Tensor:
    return numbers.to(METADATA).float()
