"""The optimal-brain-surgeon sweep: columns go one after the other, those to their right make up for it.

The sweep of SparseGPT (one-shot-baselines, section 2.4), computed in another order than published: on the
transposed matrix, and looking left. Columns collect what those before them ask for when their turn comes,
in nested spans, so that nearly all arithmetic is in large products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from scipy.linalg import lapack
from torch import Tensor

from secateur.core.numerics import damped_cholesky, exact_products
from secateur.core.statistics import InputStatistics

__all__ = ["Choose", "inverse_factor", "sweep"]

Choose = Callable[[Tensor, slice], Tensor]
"""(out, width) scores of the columns in the slice, to the mask of those that stay."""


def inverse_factor(inputs: InputStatistics, damping: float) -> tuple[Tensor, float]:
    """Upper U with inv(H + d * mean(diag H) * I) = U^T U, and the damping d that was needed.

    With J the reversal of the order, J H J = L L^T gives U = J inv(L) J: one factorisation and one
    triangular inverse. Kept in the cache of `inputs` for the matrices that share them.

    Returns:
        (in, in) float32, and the damping.

    Raises:
        NumericsError: H is not finite, or singular whatever the damping.
    """
    key = ("inverse_factor", damping)
    if key not in inputs.cache:
        if inputs.hessian is None:
            raise ValueError("the Hessian was not observed")
        lower, used = damped_cholesky(inputs.hessian.flip(0, 1), damping)
        inputs.cache[key] = (_lower_inverse(lower).flip(0, 1), used)
    return cast("tuple[Tensor, float]", inputs.cache[key])


def _lower_inverse(lower: Tensor) -> Tensor:
    if lower.is_cuda:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    # LAPACK knows that the inverse is triangular too: a third of the work of a solve, and in place
    invert = lapack.dtrtri if lower.dtype == torch.float64 else lapack.strtri
    inverse, _ = invert(lower.numpy(), lower=1, overwrite_c=1)
    return torch.as_tensor(inverse)


def sweep(
    weight: Tensor, upper: Tensor, choose: Choose, *, widths: Sequence[int], level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune all columns from left to right.

    Args:
        weight: (out, in) float32, not changed.
        upper: (in, in) of `inverse_factor`.
        choose: called with the scores w^2 / U_ii^2 of the current weights.
        widths: of the nested spans of columns, widest first. A span is brought up to date by one product
            when its turn comes; in the innermost the columns go one by one. Any widths give the same.
        level: index in `widths` of the spans whose columns are chosen together.

    Returns:
        New weight (out, in), mask of what stays (out, in), and the sum of squared errors e^2, a scalar:
        for H = U^-1 U^-T it equals tr(dW H dW^T).
    """
    with exact_products():
        state = _Sweep(weight, upper)
        _descend(state, slice(0, weight.shape[1]), choose, widths, level)
        new = state.current.masked_fill_(~state.kept, 0.0)
        loss = torch.linalg.vector_norm(state.errors, dtype=torch.float64).square()
    return new.T.contiguous(), state.kept.T.contiguous(), loss


def _descend(state: _Sweep, columns: slice, choose: Choose, widths: Sequence[int], level: int) -> None:
    for part in _spans(columns.start, columns.stop, widths[0]):
        state.collect(part, columns.start)
        if level == 0:
            state.choose(part, choose)
        if len(widths) > 1:
            _descend(state, part, choose, widths[1:], level - 1)
        else:
            state.eliminate(part)


def _spans(start: int, stop: int, width: int) -> Iterator[slice]:
    return (slice(at, min(at + width, stop)) for at in range(start, stop, width))


class _Sweep:
    """The state of one sweep, all (in, out): a column of the matrix is one contiguous line."""

    def __init__(self, weight: Tensor, upper: Tensor) -> None:
        self.upper = upper
        self.diagonal = upper.diagonal()[:, None]
        self.current = weight.T.clone(memory_format=torch.contiguous_format)
        self.errors = torch.empty_like(self.current)
        self.kept = torch.empty_like(self.current, dtype=torch.bool)

    def collect(self, columns: slice, since: int) -> None:
        """Take in what the pruned columns from `since` up to these ask for."""
        done = slice(since, columns.start)
        if since < columns.start:
            self.current[columns].addmm_(self.upper[done, columns].T, self.errors[done], alpha=-1)

    def choose(self, columns: slice, choose: Choose) -> None:
        scores = (self.current[columns] / self.diagonal[columns]).square_()
        self.kept[columns] = choose(scores.T, columns).T

    def eliminate(self, columns: slice) -> None:
        """Fix the columns one by one; each error depends on those before it."""
        current, errors = self.current[columns], self.errors[columns]
        owed = self.upper[columns, columns].T.contiguous()
        share = (~self.kept[columns]) / self.diagonal[columns]
        for i in range(len(current)):
            if i:
                current[i].addmv_(errors[:i].T, owed[i, :i], alpha=-1)
            torch.mul(current[i], share[i], out=errors[i])
