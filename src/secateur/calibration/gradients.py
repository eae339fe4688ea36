"""Gradient magnitudes of the loss with respect to every matrix, in bounded memory.

GBLM-Pruner (arXiv 2311.04902), sections 2.1 and 2.6 of its spec: for each sequence alone, the gradient g of
the mean next-token cross-entropy over all its tokens; summed up are |g| or g^2. Dropout is off (evaluation
mode), everything is float32, and only matrices inside blocks count, so a tied head does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from secateur.anatomy.model import Block
from secateur.calibration.activations import Activations
from secateur.calibration.distributed import Group
from secateur.calibration.forward import Forward
from secateur.calibration.gradient_store import GradientStore, Norm
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.progress import SILENT, Progress, Task

__all__ = ["GradientStore", "Norm", "collect_gradients", "next_token_loss"]

BUDGET_BYTES = 1 << 30

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
    source = source.in_dtype(torch.float32)
    windows.require_fits(source.config)
    run = _Collection(source, windows, norm, budget_bytes, group)
    store = GradientStore(folder, source.anatomy)
    store.begin(run.identity, write=run.leads)
    steps = 2 * len(source.anatomy.blocks) * (run.chunks - store.chunks)
    with progress.task("gradients", steps) as task:
        for chunk in range(store.chunks, run.chunks):
            run.collect(store, chunk, task)
    if group is not None:
        group.barrier()  # until process 0 has written the last file
    return store


class _Collection:
    """The passes over all chunks. In a group every process does its part of each chunk, process 0 writes."""

    def __init__(
        self, source: BlockSource, windows: Windows, norm: Norm, budget_bytes: int, group: Group | None
    ) -> None:
        blocks = source.model.get_submodule(source.anatomy.blocks_path)
        self.source, self.norm, self.group = source, norm, group
        self.forward = Forward(source.model, list(blocks.children()), source.device)
        self.sequences, self.length = list(windows.batches(1)), windows.length
        self.size = _sequences_at_once(source, windows.length, budget_bytes)
        shards = _shard_sizes(len(windows), group)
        self.chunks = -(-max(shards) // self.size)
        self.leads = group is None or group.rank == 0
        self.identity = self._agreed(
            {
                "norm": norm,
                "windows_sha256": windows.sha256,
                "shards": shards,
                "chunk_sequences": self.size,
            }
        )

    def collect(self, store: GradientStore, chunk: int, task: Task) -> None:
        """Forward and backward of one chunk, into the store."""
        sequences = self.sequences[chunk * self.size : (chunk + 1) * self.size]
        held = Activations(self.forward, self.source.device, len(sequences), self.length)
        for sequence in sequences:
            held.add(sequence)
        inputs = self._forward(held, task)
        loss = self._head(held)
        for block in reversed(self.source.anatomy.blocks):
            done = self._agreed(self.leads and store.holds(block.index, chunk))
            sums = self._backward(block, held, inputs.pop(), done)
            if self.leads and not done:
                store.add(block.index, chunk, sums)
            task.advance()
        tokens = sum(sequence.tokens for sequence in sequences)
        totals = torch.tensor([len(sequences), tokens, loss], dtype=torch.float64)
        if self.group is not None:
            self.group.all_reduce(totals)
        store.close_chunk(*totals.tolist(), write=self.leads)

    def _forward(self, held: Activations, task: Task) -> list[Tensor]:
        """Leaves the output of the last block in `held`; returns the inputs of every block."""
        inputs: list[Tensor] = []
        for block in self.source.anatomy.blocks:
            inputs.append(held.copy())
            module = self.source.open(block.index)
            for batch in held.batches:
                held.replace(batch, held.run(batch, block.index, module))
            self.source.store(block.index, module)
            task.advance()
        return inputs

    def _head(self, held: Activations) -> float:
        """Turns `held` into the gradients of the output of the last block; returns the sum of the losses."""
        total = 0.0
        for batch in held.batches:
            hidden = held.input(batch).detach().requires_grad_()
            with differentiating(self.source.device):
                loss = next_token_loss(self.forward.logits(batch.windows, hidden), batch.windows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            held.replace(batch, _gradient(hidden))
        return total

    def _backward(self, block: Block, held: Activations, inputs: Tensor, done: bool) -> dict[str, Tensor]:
        """Moves the gradients in `held` before the block; returns the sums of those of its parameters."""
        module = self.source.open(block.index)
        names = () if done else dict.fromkeys(matrix.parameter for matrix in block.matrices)
        parameters = {name: module.get_parameter(name).requires_grad_() for name in names}
        sums = {name: torch.zeros_like(parameter).detach() for name, parameter in parameters.items()}
        for batch in held.batches:
            hidden = inputs[batch.where].to(self.source.device).requires_grad_()
            with differentiating(self.source.device):
                output = self.forward.run(batch.calls[block.index], module, hidden)
            output.backward(held.input(batch))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                self._accumulate(sums[name], parameter)
            held.replace(batch, _gradient(hidden))
        self.source.store(block.index, module)
        if self.group is not None:
            for tensor in sums.values():
                self.group.all_reduce(tensor)
        return sums

    def _accumulate(self, total: Tensor, parameter: Tensor) -> None:
        """Add what one sequence says; a parameter it did not reach (an expert never chosen) says nothing."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            total.add_(gradient.abs_()) if self.norm == "l1" else total.addcmul_(gradient, gradient)

    def _agreed(self, value: T) -> T:
        """The value of process 0."""
        return value if self.group is None else self.group.broadcast(value)


def next_token_loss(logits: Tensor, windows: Windows) -> Tensor:
    """Mean cross-entropy over all next tokens of a batch, where both tokens are real."""
    targets = windows.ids[:, 1:].clone()
    if windows.mask is not None:
        targets[~(windows.mask[:, 1:] & windows.mask[:, :-1])] = -100
    count = (targets >= 0).sum().clamp(min=1).item()
    flat = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(flat, targets.flatten().to(logits.device), reduction="sum") / count


@contextmanager
def differentiating(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off inside."""
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("the loss does not depend on a block")
    return tensor.grad


def _sequences_at_once(source: BlockSource, length: int, budget_bytes: int) -> int:
    """How many sequences fit: float32 inputs of every block, and what moves through them."""
    hidden = source.config.get_text_config().hidden_size
    return int(max(1, budget_bytes // (4 * length * hidden * (len(source.anatomy.blocks) + 1))))


def _shard_sizes(own: int, group: Group | None) -> list[int]:
    """Windows of every process."""
    if group is None:
        return [own]
    sizes = torch.zeros(group.world, dtype=torch.int64)
    sizes[group.rank] = own
    group.all_reduce(sizes)
    return sizes.tolist()
