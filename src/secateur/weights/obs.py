"""Which weights go while columns are swept from left to right (see `secateur.core.sweep`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.core.sweep import Fix

__all__ = ["Choose", "Removal"]

Choose = Callable[[Tensor, slice], Tensor]
"""(out, width) scores of the columns in the slice, to the mask of those that stay."""


class Removal:
    """The rule of SparseGPT: the weights with the smallest w^2 / U_ii^2 become zero.

    Attributes:
        kept: (in, out) mask of what stays.

    Args:
        weight: (out, in), for its shape and device.
        choose: called with the scores of the current weights.
    """

    def __init__(self, weight: Tensor, choose: Choose) -> None:
        self.kept = torch.empty(weight.T.shape, dtype=torch.bool, device=weight.device)
        self._choose = choose

    def choose(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        scores = (weight / diagonal).square_()
        self.kept[columns] = self._choose(scores.T, columns).T

    def fix(self, columns: slice, diagonal: Tensor) -> Fix:
        share = (~self.kept[columns]) / diagonal

        def fix(column: int, weight: Tensor, error: Tensor) -> None:
            torch.mul(weight, share[column], out=error)

        return fix

    def settle(self, columns: slice, weight: Tensor) -> None:
        weight.masked_fill_(~self.kept[columns], 0.0)
