"""GPTQ: columns are rounded one after the other, and those to their right make up for it.

Compensation is complete inside a group too, whatever the bits (mc-moe, section 5.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.statistics import InputStatistics
from secateur.core.sweep import Fix, hessian_factor, sweep
from secateur.quantise.grid import GROUP, STEPS, Grid, fit, nearest

__all__ = ["Quantised", "gptq", "round_to_nearest"]

SPAN = 128
"""Columns between two large products; any number gives the same up to rounding."""
PANEL = 32


@dataclass(frozen=True)
class Quantised:
    """A matrix in a few bits.

    Attributes:
        grid: of its rows and groups.
        codes: (out, in) uint8.
        damping: fraction of the mean diagonal that the Hessian needed; None where none was used.
    """

    grid: Grid
    codes: Tensor
    damping: float | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in) float32 that it stands for."""
        return self.grid.values(self.codes)

    def rows(self, start: int, stop: int) -> Quantised:
        """Some of its rows."""
        return Quantised(self.grid.rows(start, stop), self.codes[start:stop], self.damping)


def round_to_nearest(weight: Tensor, bits: int, *, group: int = GROUP, steps: int = STEPS) -> Quantised:
    """Every weight to the nearest point of its grid. See `gptq` for the arguments."""
    grid = fit(weight, bits, group, steps)
    return Quantised(grid, grid.codes(weight))


def gptq(
    weight: Tensor,
    inputs: InputStatistics,
    bits: int,
    *,
    group: int = GROUP,
    steps: int = STEPS,
    damping: float = 0.01,
) -> Quantised:
    """Round a matrix so that its outputs change least (mc-moe, section 2.4).

    The grid of a group is fitted when the sweep reaches it, to weights that have already made up for those
    on their left.

    Args:
        weight: (out, in) float32.
        inputs: with their Hessian.
        bits: 1 to 8.
        group: columns that share a grid.
        steps: sizes of each grid that are tried (see `grid.fit`).
        damping: fraction of the mean diagonal added to the Hessian at first.

    Raises:
        NumericsError: a Hessian that is not finite or singular whatever the damping, or weights beyond
            float16.
    """
    factor, used = hessian_factor(inputs, damping)
    rule = _Rounding(weight, bits, group, steps)
    span = group * max(1, SPAN // group)
    widths = [span, group, PANEL] if span > group else [group, PANEL]
    sweep(weight, factor, rule, widths=widths, level=len(widths) - 2)
    return rule.taken(used)


class _Rounding:
    """The rule of a sweep whose columns become points of grids; `codes` is (in, out)."""

    def __init__(self, weight: Tensor, bits: int, group: int, steps: int) -> None:
        rows, columns = weight.shape
        self.bits, self.group, self.steps = bits, group, steps
        self.codes = torch.empty(columns, rows, device=weight.device)
        self.scale = torch.empty(-(-columns // group), rows, device=weight.device)
        self.low = torch.empty_like(self.scale)

    def choose(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        found = fit(weight.T, self.bits, self.group, self.steps)
        at = columns.start // self.group
        self.scale[at], self.low[at] = found.scale[:, 0], found.low[:, 0]

    def fix(self, columns: slice, diagonal: Tensor) -> Fix:
        at = columns.start // self.group
        scale, low, codes = self.scale[at], self.low[at], self.codes[columns]
        inverse = diagonal.reciprocal()

        def fix(column: int, weight: Tensor, error: Tensor) -> None:
            codes[column] = nearest(weight, scale, low, self.bits)
            torch.sub(weight, low + scale * codes[column], out=error).mul_(inverse[column])

        return fix

    def settle(self, columns: slice, weight: Tensor) -> None:
        groups = torch.arange(columns.start, columns.stop, device=weight.device) // self.group
        weight.copy_(self.codes[columns] * self.scale[groups] + self.low[groups])

    def taken(self, damping: float) -> Quantised:
        grid = Grid(self.bits, self.group, self.scale.T.contiguous(), self.low.T.contiguous())
        return Quantised(grid, self.codes.T.to(torch.uint8).contiguous(), damping)
