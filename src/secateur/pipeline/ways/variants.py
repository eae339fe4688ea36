"""How good a model is without one more piece, for many pieces at once.

All variants share the blocks before their piece; from there on each has hidden states of its own. One pass
over the blocks serves them all, so a variant costs the blocks from its piece on, and a model larger than
memory is read once for as many windows as fit (structured-baselines, section 2.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from secateur.anatomy.parts import Parts, part_sizes, without
from secateur.calibration.activations import Batch
from secateur.calibration.driver import Driver
from secateur.evaluation.memory import available_memory_bytes
from secateur.evaluation.quality import summed_loss
from secateur.structure.base import WHOLE, Piece

__all__ = ["Gone", "Variants", "more"]

Gone = Mapping[int, frozenset[str]]
"""Block -> the parts that are removed from it."""

MODEL_FRACTION, STATES_FRACTION = 0.5, 0.25
"""Of the free memory: what all blocks may take to stay there, and the hidden states of all variants."""


class Variants:
    """One model without this or that piece, on the calibration windows of this process.

    Args:
        driver: of the model.
        parts: of its blocks; empty where only whole blocks go.
    """

    def __init__(self, driver: Driver, parts: Parts) -> None:
        self.source, self.parts = driver.source, parts
        self.blocks = self.source.anatomy.blocks
        self.held = driver.embed()
        _ = self.source.model  # loads the head
        self._present = {block.index: part_sizes(block, parts).keys() for block in self.blocks}
        needed = self.source.anatomy.block_parameters * self.source.dtype.itemsize
        self._resident = needed <= MODEL_FRACTION * _free_bytes(self.source.device)
        self._modules: dict[int, nn.Module] = {}

    def losses(
        self,
        gone: Gone,
        pieces: Sequence[Piece],
        bound: float = torch.inf,
        tick: Callable[[int], None] = lambda evaluations: None,
    ) -> list[float]:
        """Summed next-token loss without `gone` and each of the pieces, infinite where it exceeds `bound`.

        Sums grow batch by batch and no loss is negative: what is given up early could not have ended lower.

        Args:
            tick: told how many batches of how many pieces, multiplied, are behind.
        """
        sums = [0.0] * len(pieces)
        for batches in self.groups(len(pieces)):
            alive = [number for number, total in enumerate(sums) if total <= bound]
            if alive:
                states = self._states(batches, gone, [pieces[number] for number in alive])
                for number, own in zip(alive, states, strict=True):
                    for batch, hidden in zip(batches, own, strict=True):
                        sums[number] += summed_loss(self.source, self.held, batch, hidden)
            tick(len(batches) * len(pieces))
        return [total if total <= bound else torch.inf for total in sums]

    def turns(self, pieces: Sequence[Piece]) -> Tensor:
        """(n + 1,) by piece the sum over tokens of 1 - cos(output of its block, output without it); the
        tokens."""
        found = torch.zeros(len(pieces) + 1, dtype=torch.float64)
        for batches in self.groups(1):
            current = list(map(self.held.input, batches))
            for block in self.blocks:
                with self._open(block.index) as module:
                    after = self._run(module, block.index, frozenset(), batches, current)
                    for number, piece in enumerate(pieces):
                        if piece.block == block.index:
                            other = self._run(module, block.index, frozenset({piece.part}), batches, current)
                            found[number] += sum(map(_turn, batches, after, other))
                current = after
            found[-1] += sum(len(batch.real(hidden)) for batch, hidden in zip(batches, current, strict=True))
        return found

    def groups(self, variants: int) -> list[list[Batch]]:
        """The batches that go through the blocks together: one by one where the blocks stay in memory, else
        as many as leave the hidden states of so many variants, and of the model itself, in a part of it."""
        batches = self.held.batches
        if self._resident:
            return [[batch] for batch in batches]
        width = self.source.anatomy.spaces.get("hidden") or self.held.input(batches[0]).shape[-1]
        largest = max(batch.tokens for batch in batches) * width * self.source.dtype.itemsize
        room = STATES_FRACTION * _free_bytes(self.source.device)
        size = max(1, int(room // ((variants + 2) * largest)))
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _states(self, batches: list[Batch], gone: Gone, pieces: Sequence[Piece]) -> list[list[Tensor]]:
        """By piece, the outputs of the last block, a batch each."""
        current = list(map(self.held.input, batches))
        states = [current] * len(pieces)
        last = max(piece.block for piece in pieces)
        for block in self.blocks:
            index, removed = block.index, gone.get(block.index, frozenset())
            if self._bypassed(index, removed):
                continue
            with self._open(index) as module:
                for number, piece in enumerate(pieces):
                    if piece.block < index:
                        states[number] = self._run(module, index, removed, batches, states[number])
                    elif piece.block == index:
                        states[number] = self._run(module, index, removed | {piece.part}, batches, current)
                if index < last:
                    current = self._run(module, index, removed, batches, current)
        return states

    def _run(
        self,
        module: nn.Module,
        index: int,
        removed: frozenset[str],
        batches: list[Batch],
        states: list[Tensor],
    ) -> list[Tensor]:
        """A block without these parts on the hidden states of some batches."""
        if self._bypassed(index, removed):
            return states
        modules = {name: gives for part in sorted(removed) for name, gives in self.parts[part].items()}
        with without(module, modules, index):
            pairs = zip(batches, states, strict=True)
            return [self.held.run(batch, index, module, hidden) for batch, hidden in pairs]

    def _bypassed(self, index: int, removed: frozenset[str]) -> bool:
        return WHOLE in removed or (bool(removed) and removed >= self._present[index])

    @contextmanager
    def _open(self, index: int) -> Iterator[nn.Module]:
        module = self._modules.get(index) or self.source.open(index)
        try:
            yield module
        finally:
            if self._resident:
                self._modules[index] = module
            else:
                self.source.store(index, module)


def more(gone: Gone, piece: Piece) -> dict[int, frozenset[str]]:
    """`gone` and one piece."""
    return {**gone, piece.block: gone.get(piece.block, frozenset()) | {piece.part}}


def _turn(batch: Batch, after: Tensor, other: Tensor) -> float:
    a, b = (normalize(batch.real(hidden).float(), dim=-1) for hidden in (after, other))
    return float((a - b).square().sum().double() / 2)  # 1 - cos, exact where it is small


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()
