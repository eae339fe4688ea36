"""A matrix as A S B: square blocks on the diagonals of A and B, zeros in S. Needs no torch to be imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Factored", "left_times", "times_right"]


@dataclass(frozen=True)
class Factored:
    """
    Attributes:
        left: (P, a, a) blocks of A.
        core: (P a, Q b) S.
        right: (Q, b, b) blocks of B.
    """

    left: Tensor
    core: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """(P a, Q b) A S B."""
        return left_times(self.left, times_right(self.core, self.right))


def left_times(left: Tensor, matrix: Tensor) -> Tensor:
    """Blocks on a diagonal (P, a, a) times (P a, n)."""
    return (left @ matrix.view(left.shape[0], left.shape[1], -1)).view(matrix.shape)


def times_right(matrix: Tensor, right: Tensor) -> Tensor:
    """(n, Q b) times blocks on a diagonal (Q, b, b)."""
    parts = matrix.view(-1, *right.shape[:2]).transpose(0, 1)
    return (parts @ right).transpose(0, 1).reshape(matrix.shape)
