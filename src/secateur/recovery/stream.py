"""The residual stream after every matrix that writes into it, in a pruned block and in the dense one.

What a block adds is the sum of what its writers give; blocks that put a norm or a factor between are not
refitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.model import Block, Matrix
from secateur.calibration.activations import Batch
from secateur.calibration.driver import OpenBlock
from secateur.calibration.observers import Gram
from secateur.core.numerics import damped_cholesky, exact_products
from secateur.core.support import solve_on_support
from secateur.recovery.refit import Refit

__all__ = ["Refitted", "adds_up", "refit_block", "writers"]

ADDS_UP = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative difference between a block's output and the sum of what its writers give, up to rounding."""

DAMPINGS = (1, 10, 100)
"""Times the damping asked for: little text wants more."""


@dataclass(frozen=True)
class Refitted:
    """What became of one writer.

    Attributes:
        matrix: which.
        before, after: squared error of the stream after it, relative to the square of the dense one, on the
            windows that were kept back.
        damping: that was best, as a fraction of the mean square of the inputs.
        changed: False where the error would not have fallen.
    """

    matrix: Matrix
    before: float
    after: float
    damping: float
    changed: bool


class Sums:
    """Of a linear map that is to be added: inputs x (C), wanted outputs e (d)."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._gram = Gram(columns, device)
        self.cross = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.error = self.scale = 0.0

    def add(self, inputs: Tensor, wanted: Tensor, reference: Tensor) -> None:
        """Tokens: (t, C), (t, d), and the dense stream (t, d) that errors are relative to."""
        with exact_products():
            self._gram.add(inputs)
            self.cross += wanted.T @ inputs
        self.error += float(wanted.square().sum())
        self.scale += float(reference.square().sum())

    def take(self) -> tuple[Tensor, Tensor]:
        """(C, C) sum of x x^T and (d, C) sum of e x^T, float64. Once."""
        return self._gram.take().double(), self.cross


def error_after(sums: tuple[Tensor, Tensor], error: float, change: Tensor) -> float:
    """Sum of |e - D x|^2 for a change D (d, C), from sums alone."""
    hessian, cross = sums
    change = change.double()
    return error - 2 * float((change * cross).sum()) + float(((change @ hessian) * change).sum())


def correction(
    hessian: Tensor, cross: Tensor, kept: Tensor | None, damping: float, steps: int
) -> tuple[Tensor, float]:
    """The D that minimises the sum of |e - D x|^2 + damping * mean(diag H) |D|^2, zero where not `kept`.

    Args:
        hessian: (C, C) float64, sum of x x^T.
        cross: (d, C) float64, sum of e x^T.
        kept: (d, C) bool, or None for everywhere.
        steps: of the solver where some are not kept.

    Returns:
        (d, C) float64, and the damping that was needed.

    Raises:
        NumericsError: sums that are not finite.
    """
    factor, used = damped_cholesky(hessian, damping)
    solved = torch.cholesky_solve(cross.T.contiguous(), factor).T
    if kept is None:
        return solved, used
    damped = hessian.clone()
    damped.diagonal().add_(used * hessian.diagonal().mean())
    scale = damped.diagonal().sqrt()
    gram = damped / scale / scale[:, None]
    start = torch.zeros_like(solved)
    values, _ = solve_on_support(gram, solved * scale, start, kept, steps)
    return values / scale, used


def writers(block: Block) -> list[Matrix]:
    """The plain matrices of a block that write into the residual stream, in order of execution."""
    return [
        matrix
        for matrix in block.matrices
        if matrix.expert is None
        and [segment.space for segment in matrix.rows.segments] == ["hidden"]
        and "hidden" not in [segment.space for segment in matrix.columns.segments]
    ]


def adds_up(opened: OpenBlock) -> bool:
    """Whether the block gives its input plus what its writers give, seen on the first batch."""
    found = writers(opened.block)
    with _watched(opened, found) as seen:
        batch, before, after = next(opened.outputs())
    streams = _streams(batch, before, [output for _, output in seen])
    expected = batch.real(after).float()
    difference = float((streams[-1] - expected).norm() / expected.norm())
    return bool(found) and difference <= ADDS_UP[after.dtype]


def refit_block(
    method: Refit, student: OpenBlock, teacher: OpenBlock, first_judging: int, stored: torch.dtype
) -> list[Refitted]:
    """Refit the writers of a block in place, each after the one before.

    Args:
        student, teacher: the same block of both models, over the same windows.
        first_judging: batches that begin at this window or after it only judge.
        stored: dtype that weights are rounded to in the file.
    """
    count = len(writers(student.block))
    return [_refit(method, student, teacher, number, first_judging, stored) for number in range(count)]


def _refit(
    method: Refit,
    student: OpenBlock,
    teacher: OpenBlock,
    number: int,
    first_judging: int,
    stored: torch.dtype,
) -> Refitted:
    matrix = writers(student.block)[number]
    fit, judge = _collect(student, teacher, number, first_judging)
    sums, held, scale = fit.take(), judge.take(), judge.scale or 1.0
    view = matrix.view(student.parameters)
    old, kept = view.float(), view != 0
    best, found, damping = judge.error, None, 0.0
    for factor in DAMPINGS:
        change, used = correction(
            *sums, None if bool(kept.all()) else kept, factor * method.damping, method.solver_steps
        )
        new = (old + change.to(old.dtype)).to(stored).to(view.dtype)
        error = error_after(held, judge.error, new.float() - old)
        if error < best:
            best, found, damping = error, new, used
    if found is not None:
        with torch.no_grad():
            view.copy_(found)
    return Refitted(matrix, judge.error / scale, best / scale, damping, found is not None)


def _collect(student: OpenBlock, teacher: OpenBlock, number: int, first_judging: int) -> tuple[Sums, Sums]:
    """Sums over the windows to fit and over those to judge by, for one writer."""
    ours, theirs = writers(student.block), writers(teacher.block)
    rows, columns = ours[number].shape
    device = ours[number].view(student.parameters).device
    fit, judge = Sums(rows, columns, device), Sums(rows, columns, device)
    with _watched(student, ours) as seen, _watched(teacher, theirs) as reference:
        batches = zip(student.outputs(), teacher.outputs(), strict=True)
        for (batch, before, _), (_, dense, _) in batches:
            stream = _streams(batch, before, [output for _, output in seen])[number]
            target = _streams(batch, dense, [output for _, output in reference])[number]
            inputs = batch.real(seen[number][0]).float()
            (fit if batch.where.start < first_judging else judge).add(inputs, target - stream, target)
            seen.clear()
            reference.clear()
    return fit, judge


def _streams(batch: Batch, before: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """(tokens, d) float32 of the residual stream after every writer."""
    stream, found = batch.real(before).float(), []
    for output in outputs:
        stream = stream + batch.real(output).float()
        found.append(stream)
    return found


@contextmanager
def _watched(opened: OpenBlock, matrices: Sequence[Matrix]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of these matrices whenever the block runs inside, in order of execution."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))

    paths = [matrix.parameter.removesuffix(".weight") for matrix in matrices]
    hooks = [opened.module.get_submodule(path).register_forward_hook(keep) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
