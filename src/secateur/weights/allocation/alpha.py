"""AlphaPruning: blocks whose spectra have heavy tails, the well-trained ones, keep more."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.method import Paper
from secateur.weights.allocation.base import (
    Allocation,
    Measured,
    NamedMatrix,
    register,
    rescaled,
)

__all__ = ["AlphaPruning", "tail_exponent"]

BINS = 100
AT_ONCE = 1 << 22
"""Entries of the candidates x eigenvalues table that are in memory together."""


@register
class AlphaPruning(Allocation):
    """Tail exponent of the spectra of a block, mapped to [1 - eps, 1 + eps] times the sparsity
    (one-shot-baselines, section 2.11). Needs no data.
    """

    id: ClassVar[str] = "alpha"
    paper: ClassVar[Paper | None] = Paper(
        "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning "
        "of Large Language Models",
        2024,
        "2410.10912",
    )
    needs_pass: ClassVar[Literal["none", "weights", "activations"]] = "weights"

    eps: float = Field(0.3, ge=0, lt=1, description="half the range of the ratios")

    def measure(self, block_index: int, matrices: list[NamedMatrix]) -> Measured:
        """`alpha`: mean tail exponent of the block's matrices."""
        exponents = [tail_exponent(weight) for _, weight, _ in matrices]
        return {"alpha": sum(exponents) / len(exponents)}

    def sparsities(self, measured: list[Measured], sizes: list[int], sparsity: float) -> list[float]:
        exponents = [block["alpha"] for block in measured]
        lowest, spread = min(exponents), max(exponents) - min(exponents)
        if spread == 0 or self.eps == 0:
            return [sparsity] * len(sizes)
        ratios = [1 - self.eps + 2 * self.eps * (value - lowest) / spread for value in exponents]
        return rescaled(ratios, sizes, sparsity)


def tail_exponent(weight: Tensor) -> float:
    """Exponent of the power law that fits the upper tail of the eigenvalues of W^T W best.

    The tail begins near the peak of the histogram of log10 eigenvalues (`BINS` bins); among those starts
    the Hill estimate with the smallest Kolmogorov-Smirnov distance wins.

    Args:
        weight: (out, in), any float type; the Gram matrix of its smaller side is formed in float64.
    """
    eigenvalues = _spectrum(weight)
    count = len(eigenvalues)
    if count < 2 or bool(eigenvalues[0] == eigenvalues[-1]):
        return 1.0
    logs = eigenvalues.log()
    above = logs.flip(0).cumsum(0).flip(0)  # sum of the logs from each start on
    starts = _starts(eigenvalues)
    sizes = count - starts
    hill = 1 + sizes / (above[starts] - sizes * logs[starts]).clamp_min(1e-12)
    rows = max(AT_ONCE // count, 1)
    distances = [
        _distance(logs, start, exponent)
        for start, exponent in zip(torch.split(starts, rows), torch.split(hill, rows), strict=True)
    ]
    return float(hill[torch.cat(distances).argmin()])


def _spectrum(weight: Tensor) -> Tensor:
    """(n,) float64 eigenvalues above rounding, ascending."""
    matrix = weight.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values[values > values[-1].clamp_min(0) * 1e-12]


def _starts(eigenvalues: Tensor) -> Tensor:
    """Indices where the tail may begin: eigenvalues within [0.95, 1.5] times the peak of the histogram."""
    decades = eigenvalues.log10()
    low, high = float(decades[0]), float(decades[-1])
    peak = int(torch.histc(decades.cpu(), BINS, low, high).argmax())
    mode = 10 ** (low + peak * (high - low) / BINS)
    near = ((eigenvalues >= 0.95 * mode) & (eigenvalues <= 1.5 * mode))[:-1].nonzero().flatten()
    return near if len(near) else torch.arange(len(eigenvalues) - 1, device=eigenvalues.device)


def _distance(logs: Tensor, starts: Tensor, exponents: Tensor) -> Tensor:
    """(k,) largest gap between the empirical and the fitted distribution of each tail."""
    place = torch.arange(len(logs), device=logs.device) - starts[:, None]
    fitted = 1 - ((logs - logs[starts][:, None]) * (1 - exponents)[:, None]).exp()
    empirical = place / (len(logs) - starts)[:, None]
    return (fitted - empirical).abs().masked_fill_(place < 0, 0).amax(1)
