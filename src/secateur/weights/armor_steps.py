"""A matrix as A S B, with A and B of square blocks on the diagonal, and steps that bring it nearer.

Block (I, K) of the product is A_I S_IK B_K, and no other block shares S_IK: all are solved at once.
A has P blocks of a, B has Q blocks of b; outputs = P a, inputs = Q b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.core.factored import Factored, left_times, times_right
from secateur.weights.nowag import Normalised

__all__ = ["STEPS", "Adam", "Factors", "Step", "block_sizes", "closed_form", "descent", "pull"]

RIDGE = 1e-6
"""Weight of staying in place in the closed forms, of the mean curvature: what is not determined stays."""
TINY = 1e-30


@dataclass
class Factors:
    """
    Attributes:
        left: (P, a, a) blocks of A.
        core: (P a, Q b) S, zero where it is not kept.
        right: (Q, b, b) blocks of B.
        kept: (P a, Q b) bool, the support of S.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    kept: Tensor

    @classmethod
    def start(cls, matrix: Tensor, kept: Tensor, rows: int, columns: int) -> Factors:
        """The kept entries of a matrix between identities of blocks of `rows` and of `columns`."""
        eyes = [
            torch.eye(size, device=matrix.device).expand(length // size, size, size).clone()
            for length, size in zip(matrix.shape, (rows, columns), strict=True)
        ]
        return cls(eyes[0], matrix * kept, eyes[1], kept.clone())

    def copy(self) -> Factors:
        return replace(self, **{name: tensor.clone() for name, tensor in vars(self).items()})

    def product(self) -> Tensor:
        """(out, in) A S B."""
        return left_times(self.left, times_right(self.core, self.right))

    def folded(self, whole: Normalised) -> Factored:
        """With the scales of the weights in the rows of A and the columns of B (armor, section 2.6)."""
        left = self.left * whole.rows.view(len(self.left), -1, 1)
        return Factored(left, self.core, self.right * whole.columns.view(len(self.right), 1, -1))

    def loss(self, whole: Normalised) -> float:
        """sum of energy * (N - A S B)^2 over that of energy * N^2 (armor, section 2.3)."""
        return float(_energy_of(whole.matrix - self.product(), whole) / _energy_of(whole.matrix, whole))


Step = Callable[[Factors, Normalised], None]
"""Changes left, right and core of factors in place; never the support."""


def block_sizes(shape: tuple[int, int], group: int, most: int, overhead: float) -> tuple[int, int]:
    """Sizes (a, b) of the blocks of A and B: the largest up to `most` that divide outputs and inputs.

    Args:
        shape: (out, in).
        group: b is a multiple of this divisor of the inputs, and at least that.
        most: size asked for; smaller where `overhead` wants it.
        overhead: most numbers in A and B over those of the matrix, where any size keeps to it.
    """
    rows, columns = shape
    for limit in range(most, 0, -1):
        left = max(size for size in range(1, limit + 1) if rows % size == 0)
        fits = [size for size in range(group, limit + 1, group) if columns % size == 0]
        right = max(fits, default=group)
        if left * rows + right * columns <= overhead * rows * columns:
            break
    return left, right


def closed_form(factors: Factors, whole: Normalised) -> None:
    """A, then B by least squares (armor, section 2.8), then S by one exact line search on its support.

    B does not depend on the energies: within a column they are one factor.
    """
    gram, target = _left_equations(factors, whole)
    factors.left.copy_(_solve(gram, target, factors.left.mT).mT)
    gram, target = _right_equations(factors, whole)
    factors.right.copy_(_solve(gram, target, factors.right))
    _line_search(factors, whole)


def descent(factors: Factors, whole: Normalised) -> None:
    """A, B and S by a gradient step each, of the inverse of their smoothness (armor, section 2.5 a)."""
    gram, target = _left_equations(factors, whole)
    factors.left -= (factors.left @ gram - target) / _largest(gram)
    gram, target = _right_equations(factors, whole)
    energy = whole.energy.view(len(gram), 1, -1)
    steepest = _largest(gram) * energy.amax(-1, keepdim=True)
    factors.right -= (gram @ factors.right - target.mT) * energy / steepest
    rows = _largest(factors.left.mT @ factors.left).view(-1, 1)
    columns = _largest(factors.right * energy @ factors.right.mT).view(-1, 1)
    steps = (rows.expand(-1, factors.left.shape[1]).reshape(-1, 1)) * (
        columns.expand(-1, factors.right.shape[1]).reshape(1, -1)
    )
    factors.core += pull(factors, whole, whole.matrix - factors.product()) * factors.kept / steps


class Adam:
    """One step of Adam for A, B and S together (armor, section 2.5 a). The loss is the relative one times
    the number of weights, so that Adam's epsilon stays small beside the gradients of large matrices."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._optimiser: torch.optim.Adam | None = None

    def __call__(self, factors: Factors, whole: Normalised) -> None:
        if self._optimiser is None:
            self._scale = whole.matrix.numel() / float(_energy_of(whole.matrix, whole))
            self._optimiser = torch.optim.Adam([factors.left, factors.right, factors.core], lr=self._rate)
        residual = whole.matrix - factors.product()
        weighted = residual * whole.energy
        inner = times_right(factors.core, factors.right).view(len(factors.left), factors.left.shape[1], -1)
        outer = left_times(factors.left, factors.core)
        factors.left.grad = -2 * self._scale * (weighted.view(inner.shape) @ inner.mT)
        factors.right.grad = -2 * self._scale * (_columns(outer, factors).mT @ _columns(weighted, factors))
        factors.core.grad = -2 * self._scale * pull(factors, whole, residual) * factors.kept
        self._optimiser.step()


def pull(factors: Factors, whole: Normalised, residual: Tensor) -> Tensor:
    """(out, in) minus half the gradient of the squared error by S, on the support and off it."""
    return left_times(factors.left.mT, times_right(residual * whole.energy, factors.right.mT))


STEPS: dict[str, Callable[[float], Step]] = {
    "als": lambda rate: closed_form,
    "gd": lambda rate: descent,
    "adam": Adam,
}
"""Continuous steps by name, each made from a learning rate."""


def _left_equations(factors: Factors, whole: Normalised) -> tuple[Tensor, Tensor]:
    """G and T of A_I G_I = T_I, both (P, a, a)."""
    inner = times_right(factors.core, factors.right)
    shape = (*factors.left.shape[:2], -1)
    weighted = (inner * whole.energy).view(shape).mT
    return inner.view(shape) @ weighted, whole.matrix.view(shape) @ weighted


def _right_equations(factors: Factors, whole: Normalised) -> tuple[Tensor, Tensor]:
    """G and T of G_K B_K = T_K^T, both (Q, b, b)."""
    outer = _columns(left_times(factors.left, factors.core), factors)
    return outer.mT @ outer, _columns(whole.matrix, factors).mT @ outer


def _columns(matrix: Tensor, factors: Factors) -> Tensor:
    """(out, Q b) as (Q, out, b)."""
    return matrix.view(-1, *factors.right.shape[:2]).transpose(0, 1)


def _solve(gram: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """X of G X = T^T, drawn a little towards `start`, so that what G does not determine stays.

    That adds ridge * |X - start|^2 to what is minimised, which is zero at the start: the error cannot rise.
    """
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)[:, None, None] + TINY
    damped = gram.double() + ridge * torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    solved: Tensor = torch.linalg.solve(damped, target.mT.double() + ridge * start.double())
    return solved.float()


def _line_search(factors: Factors, whole: Normalised) -> None:
    """The best step along the gradient by S, each entry scaled by its own curvature."""
    residual = whole.matrix - factors.product()
    gradient = pull(factors, whole, residual) * factors.kept
    rows = factors.left.square().sum(1).view(-1, 1)
    columns = (factors.right.square() * whole.energy.view(len(factors.right), 1, -1)).sum(2).view(1, -1)
    direction = gradient / (rows * columns).clamp_min(TINY)
    moved = replace(factors, core=direction).product()
    gain = (gradient * direction).sum(dtype=torch.float64)
    factors.core += direction * (gain / _energy_of(moved, whole).clamp_min(TINY)).float()


def _largest(symmetric: Tensor) -> Tensor:
    """(n, 1, 1) largest eigenvalue of each, positive."""
    values: Tensor = torch.linalg.eigvalsh(symmetric.double())
    return values[:, -1:, None].clamp_min(TINY).float()


def _energy_of(matrix: Tensor, whole: Normalised) -> Tensor:
    """Float64 scalar: sum of energy * matrix^2."""
    return (matrix.square() * whole.energy).sum(dtype=torch.float64)
