"""Calibration block by block: inputs of a block in, statistics out, outputs of the changed block on.

One-shot-baselines, section 2.0: the statistics of a block come from inputs that passed through the pruned
blocks before it, while inside the block every matrix still sees the dense one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.model import Block
from secateur.calibration.activations import Activations, Batch, Watch
from secateur.calibration.distributed import Group
from secateur.calibration.forward import Forward
from secateur.calibration.probes import Probes, SeenError
from secateur.calibration.routing import RoutingProbe
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.progress import SILENT, Progress, track
from secateur.core.statistics import BACKWARD, ROUTED, InputStatistics, RoutingStatistics, Statistic

__all__ = ["Driver", "OpenBlock", "Watch"]

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Larger batches on a CPU spend their time on fetching fresh pages for temporaries."""


class Driver:
    """Streams the blocks of a model past the calibration windows.

    Args:
        source: of the blocks.
        windows: of this process; with a `group`, its shard.
        batch_size: windows that pass a block at once; results do not depend on it beyond rounding. By
            default few enough tokens to stay in the caches of a CPU, or enough to fill a GPU.
        group: processes whose statistics are added up.

    Raises:
        CalibrationError: windows that the model cannot take.

    >>> driver = Driver(source, windows)  # doctest: +SKIP
    >>> for block in driver.blocks():  # doctest: +SKIP
    ...     statistics = block.observe({"second_moment"})
    ...     ...  # change block.parameters in place
    ...     loss = block.finish()
    """

    def __init__(
        self,
        source: BlockSource,
        windows: Windows,
        *,
        batch_size: int | None = None,
        group: Group | None = None,
        progress: Progress = SILENT,
    ) -> None:
        windows.require_fits(source.config)
        self.source, self.windows, self.group, self.progress = source, windows, group, progress
        fitting = BATCH_TOKENS[source.device.type] // windows.length
        self.batches = list(windows.batches(batch_size or max(1, fitting)))
        self._held: Activations | None = None

    def blocks(self, *, forward: bool = True, outputs: bool = True) -> Iterator[OpenBlock]:
        """The blocks in order, each to be finished before the next is asked for.

        Args:
            forward: False for a pass that needs no activations: nothing can be observed, finishing is free.
            outputs: False when nobody asks for logits afterwards: the last block is then run on its first
                batch alone, for its error.

        Raises:
            AnatomyError: a model whose blocks cannot be run one by one.
        """
        self._held = None  # frees the activations of an earlier pass before those of this one are made
        self._held = self.embed() if forward else None
        if not outputs:
            self.source.release()
        blocks = self.source.anatomy.blocks
        for block in blocks:
            module = self.source.open(block.index)
            read = outputs or block is not blocks[-1]
            opened = OpenBlock(block, module, self._held, self.group, outputs_read=read)
            try:
                yield opened
            finally:
                opened.parameters = {}  # else this block stays in memory while the next is opened
                self.source.store(block.index, module)
            if not opened.finished:
                raise RuntimeError(f"block {block.index} was not finished")

    def logits(self, batch: int) -> Tensor:
        """(B, T, vocabulary) of `batches[batch]`, after the last block was finished.

        Made by the model's own norm and head and whatever it does to their output (scaling, soft-capping),
        on the device, in the dtype of the model.
        """
        held = self._held
        if held is None or held.position != len(self.source.anatomy.blocks):
            raise RuntimeError("logits are there after the last block of a forward pass was finished")
        _ = self.source.model  # loads the head
        return held.logits(held.batches[batch])

    def embed(self) -> Activations:
        """Run everything before block 0, for a pass of the caller's own."""
        if not self.batches:
            raise RuntimeError("a forward pass without calibration windows")
        model = self.source.trunk
        blocks = model.get_submodule(self.source.anatomy.blocks_path)
        forward = Forward(model, list(blocks.children()), self.source.device)
        held = Activations(forward, self.source.device, len(self.windows), self.windows.length)
        for batch in track(self.progress, "embedding", self.batches, len(self.batches)):
            held.add(batch)
        return held


class OpenBlock:
    """One block while its parameters are in memory.

    Attributes:
        index: position in the stack.
        block: what it is made of.
        module: the block itself.
        parameters: in-memory tensors by their name inside the block; changes in place count. None are left
            when the next block is asked for.
        finished: whether `finish` was called.
    """

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        held: Activations | None,
        group: Group | None,
        *,
        outputs_read: bool,
    ) -> None:
        self.index, self.block, self.module = block.index, block, module
        self.parameters: dict[str, Tensor] = dict(module.state_dict())
        self.finished = False
        self._held, self._group, self._outputs_read = held, group, outputs_read
        self._dense: Tensor | None = None

    def observe(
        self,
        needs: Collection[Statistic],
        *,
        sites: Collection[str] | None = None,
        record_output: bool = True,
    ) -> dict[str, list[InputStatistics]]:
        """Run the block as it is on all windows.

        Args:
            needs: statistics wanted; those that take gradients or are of routed experts are left out.
            sites: where to look; by default at every site of the block.
            record_output: keep the output of the first batch, for the error that `finish` returns.

        Returns:
            By site name, one entry, or one for each expert over the tokens routed to it.
        """
        held = self._held
        if held is None:
            raise RuntimeError("a pass without activations observes nothing")
        wanted = frozenset(needs) - BACKWARD - ROUTED
        first = held.batches[0]
        if not wanted:
            self._dense = held.run(first, self.index, self.module) if record_output else None
            return {}
        with Probes(self.block, self.module, wanted, held.device, sites) as probes:
            for batch in held.batches:
                recording = record_output and batch is first
                probes.begin(batch, stop=not recording)
                output = self._run_until_seen(held, batch)
                self._dense = output if recording else self._dense
        return probes.take(sum(len(batch.windows) for batch in held.batches), self._group)

    def observe_routing(self, needs: Collection[Statistic]) -> RoutingStatistics | None:
        """Run the block as far as its experts on all windows.

        Args:
            needs: statistics wanted; those of `ROUTED` count, and `routing` always comes with them.

        Returns:
            Sums over the real tokens of all processes; `None` where the block has no routed experts, or
            nothing of them is wanted.

        Raises:
            AnatomyError: experts without a router that the axes of the block name.
        """
        held, mixture = self._held, mixture_of(self.block)
        if held is None:
            raise RuntimeError("a pass without activations observes nothing")
        if mixture is None or ROUTED.isdisjoint(needs):
            return None
        with RoutingProbe(self.block, mixture, self.module, needs, held.device) as probe:
            for batch in held.batches:
                probe.begin(batch)
                self._run_until_seen(held, batch)
        return probe.take(self._group)

    def outputs(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """What enters and what leaves the block as it is now, (B, T, d) each, batch by batch. Hooks of the
        caller on `module` see what happens inside."""
        held = self._held
        if held is None:
            raise RuntimeError("a pass without activations has no outputs")
        for batch in held.batches:
            yield batch, held.input(batch), held.run(batch, self.index, self.module)

    def finish(self, watch: Watch | None = None) -> float | None:
        """Run the block, changed or not, on all windows; its outputs become the inputs of the next.

        Args:
            watch: sees what enters and what leaves the block, batch by batch.

        Returns:
            Squared error of the output relative to that of the dense block, over the real tokens of the
            first batch of every process; `None` unless `observe` recorded that output.
        """
        self.finished = True
        held = self._held
        if held is None:
            return None
        dense, self._dense, error = self._dense, None, None
        for batch in held.batches if self._outputs_read else held.batches[: int(dense is not None)]:
            output = held.run(batch, self.index, self.module)
            if dense is not None:
                error, dense = self._error(batch.real(output), batch.real(dense)), None
            if watch is not None:
                watch(batch, held.input(batch), output)
            held.replace(batch, output)
        held.position += self._outputs_read
        return error

    def output(self, batch: Batch) -> Tensor:
        """(B, T, d) of the block as it is now; nothing is kept."""
        if self._held is None:
            raise RuntimeError("a pass without activations has no outputs")
        return self._held.run(batch, self.index, self.module)

    def inputs(self) -> Iterator[Tensor]:
        """The real tokens that enter the block, (tokens, d) batch by batch."""
        assert self._held is not None
        for batch in self._held.batches:
            yield batch.real(self._held.input(batch))

    def reaching(self, path: str) -> Iterator[Tensor]:
        """The real tokens that enter a submodule, (tokens, d) batch by batch; the block is run no further."""
        for batch, tensors in self.calls(path):
            yield batch.real(tensors[0].reshape(*batch.windows.ids.shape, -1))

    def calls(self, path: str) -> Iterator[tuple[Batch, list[Tensor]]]:
        """The tensors that a submodule is called with, batch by batch; the block is run no further."""
        held, seen = self._held, list[list[Tensor]]()
        assert held is not None

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
            raise SeenError

        hook = self.module.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for batch in held.batches:
                self._run_until_seen(held, batch)
                yield batch, seen.pop()
        finally:
            hook.remove()

    def _run_until_seen(self, held: Activations, batch: Batch) -> Tensor | None:
        """The output of the block, or `None` where it was left as soon as every site was reached."""
        try:
            return held.run(batch, self.index, self.module)
        except SeenError:
            return None

    def _error(self, output: Tensor, dense: Tensor) -> float:
        dense = dense.float()
        sums = torch.stack([(output.float() - dense).square().sum(), dense.square().sum()]).double()
        if self._group is not None:
            self._group.all_reduce(sums)
        error, scale = sums.tolist()
        return error / scale if scale else float(error > 0)
