"""Hidden states of all windows between two blocks, and the running of blocks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.calibration.forward import Call, Forward
from secateur.calibration.windows import Windows

__all__ = ["Activations", "Batch", "Watch", "computing"]

DEVICE_BYTES = 4 << 30
DEVICE_FRACTION = 0.25


@dataclass(frozen=True)
class Batch:
    """Attributes:
    windows: its token ids.
    rows: indices of the real ones among its B * T tokens, on the device; `None` when all are.
    calls: what the model passes to each block for it.
    where: its rows in the buffer.
    """

    windows: Windows
    rows: Tensor | None
    calls: tuple[Call, ...]
    where: slice

    @property
    def tokens(self) -> int:
        """B * T, padding included."""
        return self.windows.ids.numel()

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens of each window."""
        ids, mask = self.windows.ids, self.windows.mask
        return torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)

    def real(self, hidden: Tensor) -> Tensor:
        """The real tokens of (B, T, d), as (tokens, d)."""
        flat = hidden.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]


Watch = Callable[[Batch, Tensor, Tensor], None]
"""Called with a batch and its hidden states, (B, T, d), before and after a block."""


class Activations:
    """One buffer (n, T, d) that every block reads and overwrites, batch by batch.

    On a GPU it stays in host memory when it is large; page-locked, so copies run beside the computation, in
    the order of the stream.

    Attributes:
        batches: in order.
        position: the block whose inputs are held; the number of blocks after the last.

    Args:
        forward: of the model.
        device: where it computes.
        count, length: n windows of T tokens, to be added batch by batch.
    """

    def __init__(self, forward: Forward, device: torch.device, count: int, length: int) -> None:
        self.device, self.position = device, 0
        self.batches: list[Batch] = []
        self._forward, self._shape = forward, (count, length)
        self._buffer: Tensor | None = None
        self._widths: dict[int, int] = {}  # of the batches; the blocks of a sliced model differ

    def add(self, windows: Windows) -> None:
        """Run everything before block 0 on the next batch."""
        with computing(self.device):
            captured = self._forward.capture(windows)
        if self._buffer is None:
            self._buffer = _allocate(self._shape, captured.hidden)
        calls = captured.calls
        for known in self.batches[-1:] + self.batches[:1]:
            if len(known.windows) == len(windows) and captured.same_calls(known.calls):
                calls = known.calls  # masks and rotary tables are the same objects for most batches
        start = self.batches[-1].where.stop if self.batches else 0
        rows = None
        if windows.mask is not None and not bool(windows.mask.all()):
            rows = windows.mask.flatten().nonzero().squeeze(1).to(self.device)
        batch = Batch(windows, rows, calls, slice(start, start + len(windows)))
        self.batches.append(batch)
        self.replace(batch, captured.hidden)

    def input(self, batch: Batch) -> Tensor:
        """(B, T, d) on the device."""
        held = self._held[batch.where][..., : self._widths[batch.where.start]]
        return held.to(self.device, non_blocking=True)

    def run(self, batch: Batch, index: int, module: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Output of block `index`, (B, T, d), from what is held or from other hidden states."""
        with computing(self.device):
            hidden = self.input(batch) if hidden is None else hidden
            return self._forward.run(batch.calls[index], module, hidden)

    def replace(self, batch: Batch, hidden: Tensor) -> None:
        """Let the output of a block be the input of the next."""
        width = self._widths[batch.where.start] = hidden.shape[-1]
        if width > self._held.shape[-1]:
            narrow, self._buffer = self.copy(), _allocate(self._shape, hidden)
            self._held[..., : narrow.shape[-1]].copy_(narrow)
        self._held[batch.where][..., :width].copy_(hidden, non_blocking=True)

    def copy(self) -> Tensor:
        """What is held, (n, T, d); empty if nothing is."""
        if self._buffer is None:
            return torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # copies into host memory may be on their way
        return self._buffer.clone()

    def logits(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """(B, T, vocabulary) from what is held or other hidden states, by the model's own norm and head."""
        with computing(self.device):
            return self._forward.logits(batch.windows, self.input(batch) if hidden is None else hidden)

    @property
    def _held(self) -> Tensor:
        if self._buffer is None:
            raise RuntimeError("no batch was added")
        return self._buffer


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast inside."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _allocate(shape: tuple[int, int], like: Tensor) -> Tensor:
    """An (n, T, d) buffer on the device of `like` if it takes a small part of it, else in host memory."""
    full, device = (*shape, like.shape[-1]), like.device
    if device.type != "cuda":
        return torch.empty(full, dtype=like.dtype)
    needed = shape[0] * shape[1] * like.shape[-1] * like.dtype.itemsize
    if needed <= min(DEVICE_BYTES, DEVICE_FRACTION * torch.cuda.mem_get_info(device)[0]):
        return torch.empty(full, dtype=like.dtype, device=device)
    return torch.empty(full, dtype=like.dtype, pin_memory=True)
