"""Sums over the tokens that reach one matrix input, in bounded memory.

Policy: sums across batches in float64; the products of a batch in float32 without TF32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from secateur.core.numerics import exact_products
from secateur.core.statistics import InputStatistics, Statistic

__all__ = ["Gram", "Moments"]

CPU_CHUNK_ELEMENTS = 1 << 20  # squares of a chunk stay in the cache
GPU_CHUNK_ELEMENTS = 1 << 26
PANELS = 16
PANEL_COLUMNS = 256


class Gram:
    """Sum of x x^T. Only panels on and above the diagonal are computed and kept, half of the matrix."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns = columns
        self._width = max(PANEL_COLUMNS, -(-columns // PANELS))
        self._panels = [
            torch.zeros(
                min(self._width, columns - start), columns - start, dtype=torch.float64, device=device
            )
            for start in range(0, columns, self._width)
        ]

    @property
    def sums(self) -> list[Tensor]:
        """What adds up over processes."""
        return self._panels

    def add(self, rows: Tensor) -> None:
        """Add the products of `rows`, (tokens, C) float32."""
        for start, panel in self._each():
            panel += rows[:, start : start + self._width].T @ rows[:, start:]

    def diagonal(self) -> Tensor:
        """(C,) float64."""
        return torch.cat([panel.diagonal() for panel in self._panels])

    def take(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(C, C), exactly symmetric. The sums are gone afterwards."""
        full = torch.empty(self.columns, self.columns, dtype=dtype, device=self._panels[0].device)
        for start, panel in self._each():
            stop = start + len(panel)
            square = panel[:, : len(panel)]
            full[start:stop, start:stop] = square.triu() + square.triu(1).T
            full[start:stop, stop:] = panel[:, len(panel) :]
            full[stop:, start:stop] = full[start:stop, stop:].T
            self._panels[start // self._width] = panel.new_empty(0)
        return full

    def _each(self) -> Iterator[tuple[int, Tensor]]:
        return zip(range(0, self.columns, self._width), self._panels, strict=True)


class Moments:
    """The statistics of one input; only those asked for are computed.

    Args:
        columns: width C of the input.
        needs: statistics asked for.
        device: of the tokens.
    """

    def __init__(self, columns: int, needs: Collection[Statistic], device: torch.device) -> None:
        self.columns, self.tokens = columns, 0
        self._needs = frozenset(needs)
        self._chunk = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
        zeros = torch.zeros(3, columns, dtype=torch.float64, device=device)
        self._gram = Gram(columns, device) if "hessian" in needs else None
        self._squares = zeros[0] if "second_moment" in needs and self._gram is None else None
        self._sum = zeros[1] if "mean" in needs else None
        self._activity = zeros[2] if "activity" in needs else None

    def add(self, rows: Tensor, lengths: Tensor | None = None) -> None:
        """Add tokens: `rows` (tokens, C) of any floating dtype; for `activity` with the `lengths` (B,) of the
        sequences they are from."""
        self.tokens += len(rows)
        for part in torch.split(rows, max(1, self._chunk // self.columns)):
            exact = part.float()
            if self._squares is not None:
                self._squares += exact.square().sum(0)
            if self._sum is not None:
                self._sum += exact.sum(0)
        if self._activity is not None:
            self._activity += _sequence_means(rows, lengths).square().sum(0)
        if self._gram is not None:
            with exact_products():
                for part in torch.split(rows, max(1, GPU_CHUNK_ELEMENTS // self.columns)):
                    self._gram.add(part.float())

    @property
    def sums(self) -> list[Tensor]:
        """What adds up over processes, beside `tokens`."""
        kept = [tensor for tensor in (self._squares, self._sum, self._activity) if tensor is not None]
        return kept + (self._gram.sums if self._gram else [])

    def take(self, sequences: int) -> InputStatistics:
        """The statistics, of tokens from so many sequences. The sums are gone afterwards."""
        found = InputStatistics(
            self.columns, self.tokens, sequences, self._squares, self._sum, activity=self._activity
        )
        if self._gram is not None:
            found.second_moment = self._gram.diagonal()
            found.hessian = self._gram.take()
            self._gram = None
        return found


def _sequence_means(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, C) float64 mean over the tokens of each sequence of |x|; rows stand sequence by sequence."""
    if lengths is None:
        raise ValueError("activity is observed where whole sequences arrive, not at experts")
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths.to(rows.device))
    sums = torch.zeros(len(lengths), rows.shape[1], dtype=torch.float64, device=rows.device)
    sums.index_add_(0, owners, rows.abs().double())
    return sums / lengths.to(rows.device).clamp_min(1)[:, None]
