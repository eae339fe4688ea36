"""The optimal-brain-surgeon sweep: columns go one after the other, those to their right make up for it.

The sweep of SparseGPT (one-shot-baselines, section 2.4) and of GPTQ (mc-moe, section 2.4), without the
inverse of the Hessian. Published is U with inv(H) = U^T U, and the columns b to the right of finished ones,
f, lose E_f U_fb, where E are their scaled errors. Let H = V V^T with V upper triangular, so that U = inv(V).
As E U is the change of the weights so far, D, that loss is also -D_f V_fb inv(V_bb): one factorisation, and
inverses of small blocks.

Everything runs on the transposed matrix and looks left: columns take in what those before them ask for
when their turn comes, in nested spans, so that nearly all arithmetic is in large products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from secateur.core.numerics import damped_cholesky, exact_products
from secateur.core.statistics import InputStatistics

__all__ = ["Fix", "Rule", "hessian_factor", "sweep"]

Fix = Callable[[int, Tensor, Tensor], None]
"""Number of a column in its span, its (out,) weights, and where its (out,) scaled error is written."""


class Rule(Protocol):
    """What becomes of the columns. Tensors are transposed, (columns, out); slices count from the first."""

    def choose(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        """Look at columns that are decided together, up to date; `diagonal` (columns, 1) is theirs of U."""

    def fix(self, columns: slice, diagonal: Tensor) -> Fix:
        """How to fix the columns of an innermost span, one by one: the error is (w - new) / diagonal."""

    def settle(self, columns: slice, weight: Tensor) -> None:
        """Put the new values in place of the weights."""


def hessian_factor(inputs: InputStatistics, damping: float) -> tuple[Tensor, float]:
    """Upper V with H + d * mean(diag H) * I = V V^T, and the damping d that was needed.

    It is the lower factor of the Hessian in reversed order, reversed back. Kept in the cache of `inputs`
    for the matrices that share them.

    Returns:
        (in, in) float32, and the damping.

    Raises:
        NumericsError: H is not finite, or singular whatever the damping.
    """
    key = ("hessian_factor", damping)
    if key not in inputs.cache:
        if inputs.hessian is None:
            raise ValueError("the Hessian was not observed")
        lower, used = damped_cholesky(inputs.hessian.flip(0, 1), damping)
        inputs.cache[key] = (lower.flip(0, 1), used)
    return cast("tuple[Tensor, float]", inputs.cache[key])


def sweep(
    weight: Tensor, factor: Tensor, rule: Rule, *, widths: Sequence[int], level: int
) -> tuple[Tensor, Tensor]:
    """Fix all columns from left to right.

    Args:
        weight: (out, in) float32, not changed.
        factor: (in, in) of `hessian_factor`.
        rule: what becomes of them.
        widths: of the nested spans of columns, widest first; in the innermost the columns go one by one.
            Any widths give the same up to rounding.
        level: index in `widths` of the spans whose columns are chosen together.

    Returns:
        New weight (out, in), and the sum of squared errors e^2, a scalar that equals tr(D V V^T D^T).
    """
    new = weight.T.clone(memory_format=torch.contiguous_format)  # a column is one contiguous line
    change = torch.empty_like(new)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    with exact_products():
        for columns in _spans(0, len(new), widths[0]):
            block = _Block(new[columns], factor[columns, columns], columns.start, rule)
            change[columns] = block.weight
            block.take_in(factor[: columns.start, columns], change[: columns.start])
            block.work(slice(0, len(block.weight)), widths, level)
            rule.settle(columns, block.weight)
            change[columns] -= block.weight
            loss += block.errors.square().sum(dtype=torch.float64)
    return new.T.contiguous(), loss


def _spans(start: int, stop: int, width: int) -> Iterator[slice]:
    return (slice(at, min(at + width, stop)) for at in range(start, stop, width))


class _Block:
    """Columns that are worked on together, (width, out); `weight` is a view of the whole.

    Attributes:
        upper: (width, width) inv(V_bb), which is U within the block.
        errors: e of each column, zero where the weight stays.
    """

    def __init__(self, weight: Tensor, factor: Tensor, offset: int, rule: Rule) -> None:
        self.weight = weight
        self.errors = torch.empty_like(weight)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.upper: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
        self._diagonal = self.upper.diagonal()[:, None]
        self._offset, self._rule = offset, rule

    def take_in(self, factor: Tensor, change: Tensor) -> None:
        """Make up for the `change` so far; `factor` (finished, width) ties the block to it."""
        if len(change):
            self.weight.addmm_((factor @ self.upper).T, change)

    def work(self, columns: slice, widths: Sequence[int], level: int) -> None:
        """Bring the spans inside `columns` up to date in turn and fix them."""
        for part in _spans(columns.start, columns.stop, widths[0]):
            self._collect(part, columns.start)
            if level == 0:
                self._rule.choose(self._place(part), self.weight[part], self._diagonal[part])
            if len(widths) > 1:
                self.work(part, widths[1:], level - 1)
            else:
                self._eliminate(part)

    def _place(self, columns: slice) -> slice:
        return slice(self._offset + columns.start, self._offset + columns.stop)

    def _collect(self, columns: slice, since: int) -> None:
        """Take in what the columns from `since` up to these ask for."""
        done = slice(since, columns.start)
        if since < columns.start:
            self.weight[columns].addmm_(self.upper[done, columns].T, self.errors[done], alpha=-1)

    def _eliminate(self, columns: slice) -> None:
        """Fix the columns one by one; each error depends on those before it."""
        weight, errors = self.weight[columns], self.errors[columns]
        owed = self.upper[columns, columns].T.contiguous()
        fix = self._rule.fix(self._place(columns), self._diagonal[columns])
        for i in range(len(weight)):
            if i:
                weight[i].addmv_(errors[:i].T, owed[i, :i], alpha=-1)
            fix(i, weight[i], errors[i])
