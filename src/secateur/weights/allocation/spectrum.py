"""The spectrum of a matrix: how heavy its tail is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tail_exponent"]

BINS = 100
AT_ONCE = 1 << 22
"""Entries of the candidates x eigenvalues table that are in memory together."""


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
