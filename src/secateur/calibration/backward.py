"""Gradients of the loss block by block: one block and its gradients in memory at a time.

Sequences pass in chunks whose block inputs fit into a budget. A chunk runs forward block by block, through
the head, and back block by block. Dropout is off (evaluation mode) and everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.anatomy.model import Block
from secateur.calibration.activations import Activations, Batch
from secateur.calibration.distributed import Group
from secateur.calibration.forward import Forward
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.progress import Task

__all__ = [
    "BUDGET_BYTES",
    "Backward",
    "Chunk",
    "IndexedWatch",
    "OpenGradients",
    "OuterGradients",
    "next_token_loss",
]

BUDGET_BYTES = 1 << 30

IndexedWatch = Callable[[int, Batch, Tensor, Tensor], None]
"""Called with the number of a block, a batch, and its hidden states, (B, T, d), before and after it."""


class Backward:
    """The chunks of the calibration sequences, each to be differentiated once.

    In a group every process takes its part of each chunk.

    Attributes:
        chunks: how many there are.
        size: sequences in a chunk, of every process.
        shards: sequences of every process.

    Args:
        source: of the blocks.
        windows: of this process; with a `group`, its shard.
        budget_bytes: memory for activations; a larger budget reads the blocks less often.
        batch_size: sequences that are differentiated together.

    Raises:
        CalibrationError: windows that the model cannot take.

    >>> backward = Backward(source, windows)  # doctest: +SKIP
    >>> for opened in backward.chunk(0).blocks(task):  # doctest: +SKIP
    ...     for gradients in opened.each(["mlp.up_proj.weight"]):
    ...         ...
    """

    def __init__(
        self,
        source: BlockSource,
        windows: Windows,
        *,
        budget_bytes: int = BUDGET_BYTES,
        batch_size: int = 1,
        group: Group | None = None,
    ) -> None:
        source = source.in_dtype(torch.float32)
        windows.require_fits(source.config)
        blocks = source.model.get_submodule(source.anatomy.blocks_path)
        self.source, self.windows = source, windows
        self._forward = Forward(source.model, list(blocks.children()), source.device)
        self._batch_size = batch_size
        self.size = _sequences_at_once(source, windows.length, budget_bytes)
        self.shards = _shard_sizes(len(windows), group)
        self.chunks = -(-max(self.shards) // self.size)

    def chunk(self, number: int) -> Chunk:
        """The sequences of this process in chunk `number`; there may be none."""
        part = list(self.windows.batches(self.size))[number : number + 1]
        batches = [batch for windows in part for batch in windows.batches(self._batch_size)]
        return Chunk(self.source, self._forward, batches, self.windows.length)


class Chunk:
    """Sequences that pass forward and back once.

    Attributes:
        sequences, tokens: how many of this process.
        loss: sum over them of the mean next-token loss of each, nats a token; known once blocks come.
    """

    def __init__(self, source: BlockSource, forward: Forward, batches: list[Windows], length: int) -> None:
        self._source, self._forward, self._batches, self._length = source, forward, batches, length
        self.sequences = sum(len(batch) for batch in batches)
        self.tokens = sum(batch.tokens for batch in batches)
        self.loss = 0.0
        self._entered: tuple[Activations, Tensor] | None = None

    def blocks(
        self, task: Task, *, lowest: int = 0, watch: IndexedWatch | None = None, outer: bool = False
    ) -> Iterator[OpenGradients]:
        """The blocks from the last down to `lowest`, each with the gradients of what it wrote.

        Args:
            task: advances by one for every block forward, and for every block back.
            watch: sees what enters and leaves every block on the way forward.
            outer: keep what `outer()` needs; `lowest` is 0 then.
        """
        source = self._source
        held = Activations(self._forward, source.device, self.sequences, self._length)
        for batch in self._batches:
            held.add(batch)
        inputs = self._run(held, task, watch)
        self._entered = (held, held.copy()) if outer else None
        self.loss = self._head(held)
        for block in reversed(source.anatomy.blocks[lowest:]):
            module = source.open(block.index)
            opened = OpenGradients(block, module, self._forward, held, inputs.pop())
            yield opened
            opened.finish()
            source.store(block.index, module)
            task.advance()

    def outer(self) -> OuterGradients:
        """Embedding, norm and head, after the gradients went through all blocks."""
        if self._entered is None:
            raise RuntimeError("outer parameters are there after blocks(outer=True)")
        return OuterGradients(self._source.model, self._forward, *self._entered)

    def _run(self, held: Activations, task: Task, watch: IndexedWatch | None) -> list[Tensor]:
        """Leaves the output of the last block in `held`; returns the inputs of every block."""
        inputs: list[Tensor] = []
        for block in self._source.anatomy.blocks:
            inputs.append(held.copy())
            module = self._source.open(block.index)
            for batch in held.batches:
                output = held.run(batch, block.index, module)
                if watch is not None:
                    watch(block.index, batch, held.input(batch), output)
                held.replace(batch, output)
            self._source.store(block.index, module)
            task.advance()
        return inputs

    def _head(self, held: Activations) -> float:
        """Turns `held` into the gradients of the output of the last block; returns the sum of the losses."""
        total = 0.0
        for batch in held.batches:
            hidden = held.input(batch).detach().requires_grad_()
            with _differentiating(self._source.device):
                logits = self._forward.logits(batch.windows, hidden)
                parts = zip(torch.split(logits, 1), batch.windows.batches(1), strict=True)
                loss = torch.stack([next_token_loss(*part) for part in parts]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            held.replace(batch, _gradient(hidden))
        return total


class OpenGradients:
    """One block on the way back.

    Attributes:
        block: what it is made of.
        parameters: in-memory tensors by their name inside the block.
    """

    def __init__(
        self, block: Block, module: nn.Module, forward: Forward, held: Activations, inputs: Tensor
    ) -> None:
        self.block = block
        self.parameters: dict[str, Tensor] = dict(module.named_parameters())
        self._module, self._forward, self._held, self._inputs = module, forward, held, inputs
        self._finished = False

    def each(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Differentiate the block once, batch after batch.

        Args:
            names: the parameters whose gradients are wanted.

        Returns:
            For every batch, by name, the gradient of the sum of its losses, free to be changed. A parameter
            that no token of the batch reached (an expert never chosen) is left out.
        """
        self._finished = True
        wanted = {name: self.parameters[name].requires_grad_() for name in names}
        device = self._held.device
        for batch in self._held.batches:
            hidden = self._inputs[batch.where].to(device).requires_grad_()
            with _differentiating(device):
                output = self._forward.run(batch.calls[self.block.index], self._module, hidden)
            output.backward(self._held.input(batch))  # type: ignore[no-untyped-call]
            found = {name: p.grad for name, p in wanted.items() if p.grad is not None}
            for parameter in wanted.values():
                parameter.grad = None
            yield found
            self._held.replace(batch, _gradient(hidden))

    def finish(self) -> None:
        """Pass the gradients on to the block before, if nobody asked for those of this one."""
        if not self._finished:
            for _ in self.each(()):
                pass


class OuterGradients:
    """What stands outside the blocks: reached by the gradient of what enters them, and through the head.

    Attributes:
        parameters: by full name; a tied one is there once, and feels both ends.
    """

    def __init__(self, model: nn.Module, forward: Forward, held: Activations, outputs: Tensor) -> None:
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._forward, self._held, self._outputs = forward, held, outputs

    def each(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """As that of `OpenGradients`. The head is run again: gradients of one window after the other are not
        kept for a vocabulary."""
        wanted = {name: self.parameters[name].requires_grad_() for name in names}
        device = self._held.device
        for batch in self._held.batches:
            with _differentiating(device):
                entering = self._forward.capture(batch.windows).hidden
                logits = self._forward.logits(batch.windows, self._outputs[batch.where].to(device))
                parts = zip(torch.split(logits, 1), batch.windows.batches(1), strict=True)
                loss = torch.stack([next_token_loss(*part) for part in parts]).sum()
            ends = [(entering, self._held.input(batch)), (loss, None)]
            reached = [(end, gradient) for end, gradient in ends if end.requires_grad]
            torch.autograd.backward([end for end, _ in reached], [gradient for _, gradient in reached])
            found = {name: p.grad for name, p in wanted.items() if p.grad is not None}
            for parameter in wanted.values():
                parameter.grad = None
            yield found
        for parameter in wanted.values():
            parameter.requires_grad_(False)


def next_token_loss(logits: Tensor, windows: Windows) -> Tensor:
    """Mean cross-entropy over all next tokens of a batch, where both tokens are real."""
    targets = windows.ids[:, 1:].clone()
    if windows.mask is not None:
        targets[~(windows.mask[:, 1:] & windows.mask[:, :-1])] = -100
    count = (targets >= 0).sum().clamp(min=1).item()
    flat = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(flat, targets.flatten().to(logits.device), reduction="sum") / count


@contextmanager
def _differentiating(device: torch.device) -> Iterator[None]:
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
