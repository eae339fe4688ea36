"""Gradient magnitudes of the loss with respect to every matrix, in bounded memory.

GBLM-Pruner (arXiv 2311.04902), sections 2.1 and 2.6 of its spec: for each sequence alone, the gradient g of
the mean next-token cross-entropy over all its tokens; summed up are |g| or g^2. Dropout is off (evaluation
mode), everything is float32, and only matrices inside blocks count, so a tied head does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from secateur.calibration.backward import BUDGET_BYTES, Backward, OpenGradients
from secateur.calibration.distributed import Group
from secateur.calibration.gradient_store import GradientStore, Norm
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.progress import SILENT, Progress, Task

__all__ = ["GradientStore", "Norm", "collect_gradients"]

T = TypeVar("T")


def collect_gradients(
    source: BlockSource,
    windows: Windows,
    *,
    norm: Norm,
    folder: Path,
    budget_bytes: int = BUDGET_BYTES,
    progress: Progress = SILENT,
    group: Group | None = None,
) -> GradientStore:
    """Accumulate per-sequence gradient magnitudes of the model of `source`.

    Sequences pass in chunks whose block inputs fit into `budget_bytes`. A chunk runs forward block by block,
    through the head, and back block by block; one block and the sums of one block are in memory at a time.
    Every chunk reads all blocks twice and rewrites all sums once, so a larger budget is faster.

    Args:
        windows: of this process; with a `group`, its shard.
        norm: `l1` sums |g|; `l2` sums g^2 and takes the root at the end.
        folder: for the sums, 4 bytes a weight; shared by the processes of a group. A run that was killed
            continues there and ends with the same bits.
        budget_bytes: memory for activations.

    Raises:
        CalibrationError: windows that the model cannot take.
        ResumeError: the folder belongs to another run.
    """
    run = _Collection(Backward(source, windows, budget_bytes=budget_bytes, group=group), norm, group)
    store = GradientStore(folder, source.anatomy)
    store.begin(run.identity, write=run.leads)
    steps = 2 * len(source.anatomy.blocks) * (run.backward.chunks - store.chunks)
    with progress.task("gradients", steps) as task:
        for chunk in range(store.chunks, run.backward.chunks):
            run.collect(store, chunk, task)
    if group is not None:
        group.barrier()  # until process 0 has written the last file
    return store


class _Collection:
    """The sums of all chunks; in a group process 0 writes them."""

    def __init__(self, backward: Backward, norm: Norm, group: Group | None) -> None:
        self.backward, self.norm, self.group = backward, norm, group
        self.leads = group is None or group.rank == 0
        self.identity = self._agreed(
            {
                "norm": norm,
                "windows_sha256": backward.windows.sha256,
                "shards": backward.shards,
                "chunk_sequences": backward.size,
            }
        )

    def collect(self, store: GradientStore, number: int, task: Task) -> None:
        """Forward and backward of one chunk, into the store."""
        chunk = self.backward.chunk(number)
        for opened in chunk.blocks(task):
            index = opened.block.index
            if not self._agreed(self.leads and store.holds(index, number)):
                sums = self._sums(opened)
                if self.leads:
                    store.add(index, number, sums)
        totals = torch.tensor([chunk.sequences, chunk.tokens, chunk.loss], dtype=torch.float64)
        if self.group is not None:
            self.group.all_reduce(totals)
        store.close_chunk(*totals.tolist(), write=self.leads)

    def _sums(self, opened: OpenGradients) -> dict[str, Tensor]:
        """What single sequences say, added up over all processes; one that does not reach a parameter (an
        expert never chosen) says nothing."""
        names = dict.fromkeys(matrix.parameter for matrix in opened.block.matrices)
        sums = {name: torch.zeros_like(opened.parameters[name]).detach() for name in names}
        for gradients in opened.each(names):
            for name, gradient in gradients.items():
                if self.norm == "l1":
                    sums[name].add_(gradient.abs_())
                else:
                    sums[name].addcmul_(gradient, gradient)
        if self.group is not None:
            for tensor in sums.values():
                self.group.all_reduce(tensor)
        return sums

    def _agreed(self, value: T) -> T:
        """The value of process 0."""
        return value if self.group is None else self.group.broadcast(value)
