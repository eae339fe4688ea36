"""What a pruning run on files carries from step to step, and what each family of methods gives back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.distributed import Group
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.windows import Windows
from secateur.checkpoint.packing import Packed
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors, torch_dtype
from secateur.checkpoint.safetensors_header import read_header
from secateur.checkpoint.writer import CheckpointWriter, read_part
from secateur.core.method import Method
from secateur.core.progress import Progress
from secateur.pipeline.data import RunData
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.decode_costs import DecodeTable
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer, Precision

__all__ = ["PLAN", "PREPARED", "SCORES", "UNEQUAL", "Outcome", "Run", "as_stored", "part_name"]

SCORES, PLAN = "scores.safetensors", "plan.json"
PREPARED = "prepared.safetensors"
UNEQUAL = (
    "Blocks differ, or have biases or numbers of heads that the stock class cannot have: load it after "
    "`import secateur`, or with trust_remote_code=True."
)


@dataclass
class Run:
    """One run; `writer` is None on all processes but the first."""

    recipe: Recipe
    out: Path
    opened: Opened
    method: Method
    data: RunData
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    group: Group | None
    writer: CheckpointWriter | None
    decode: DecodeTable | None = None

    def driver(
        self,
        read: Callable[[int], dict[str, Tensor] | None] | None = None,
        windows: Windows | None = None,
    ) -> Driver:
        """A fresh pass over the blocks; `read(i)` supplies blocks that are already pruned, `windows` others
        than those of the run."""
        windows = windows or self.data.calibration
        if self.group:
            windows = windows.shard(self.group.rank, self.group.world)
        source = self.opened.source(self.device, self.dtype, read=read)
        return Driver(source, windows, batch_size=self.recipe.calibration.batch_size, group=self.group)

    @property
    def scratch(self) -> Path:
        """Where intermediate results lie."""
        return self.out / ".secateur" / "scratch"

    def finished(self) -> dict[int, dict[str, Any]]:
        """Records of the blocks that are written, in this run or before."""
        parts = dict(self.writer.parts) if self.writer else {}
        if self.group:
            parts = self.group.broadcast(parts)
        indices = range(len(self.opened.anatomy.blocks))
        return {index: parts[part_name(index)] for index in indices if part_name(index) in parts}

    def written(self, done: Collection[int]) -> Callable[[int], dict[str, Tensor] | None]:
        """Reads the blocks in `done` from the parts that an earlier run wrote; None for the others."""

        def read(index: int) -> dict[str, Tensor] | None:
            return read_part(self.out, part_name(index)) if index in done else None

        return read

    def as_stored(self, block: OpenBlock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Round a block to the dtypes of its file, so that what propagates is what is written.

        Returns:
            Its tensors by name on disk, and by name inside the block.
        """
        return as_stored(self.opened, block)

    def remembered(self, find: Callable[[], dict[str, Tensor]], name: str = SCORES) -> dict[str, Tensor]:
        """Tensors of the run that was interrupted, or new ones, which the next resume finds."""
        path = self.scratch / name
        if path.exists():
            return read_tensors(path, read_header(path).values())
        found = find()
        if self.writer and found:
            save_tensors(self.writer.workspace / name, found)
        return found

    def keep(self, index: int, tensors: Mapping[str, Tensor | Packed], record: dict[str, Any]) -> None:
        """Make a finished block durable."""
        if self.writer:
            self.writer.write(part_name(index), tensors, record)


@dataclass
class Outcome:
    """What was done to the blocks, which are written by now.

    Attributes:
        layers: a row a matrix or kind of unit.
        blocks: a row a block.
        sparsity: fraction removed of what the method's family counts.
        zeros: weights that were set to zero and are still stored.
        config_updates: keys of config.json that change.
        dropped: tensors of the source that are gone.
        outer: what is written in place of the tensors outside the blocks, both by their names on disk; None
            copies them.
        files: further files to publish.
        warnings: what the user should know, one sentence each.
        requested: the sparsity that was asked for, where the recipe says a budget or a plan instead.
        structure: what is known of a structured result beyond its files (see `report.model.Structure`).
        precision: the bits of a result that is stored in few.
    """

    layers: list[Layer]
    blocks: list[Block]
    sparsity: float
    zeros: int = 0
    config_updates: dict[str, Any] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    outer: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    files: dict[str, str | bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    requested: float | None = None
    structure: dict[str, Any] = field(default_factory=dict)
    precision: Precision | None = None

    @classmethod
    def of_weights(cls, layers: list[Layer], blocks: list[Block], *, leaves_zeros: bool = True) -> Outcome:
        """Of a run that set single weights to zero, in the files or (`leaves_zeros` False) in a factor."""
        total = sum(layer.rows * layer.columns for layer in layers)
        gone = sum(round(layer.sparsity * layer.rows * layer.columns) for layer in layers)
        return cls(layers, blocks, gone / total, gone if leaves_zeros else 0)


def as_stored(opened: Opened, block: OpenBlock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Round a block to the dtypes of its file; its tensors by name on disk, and by name inside the block."""
    checkpoint, layout = opened.checkpoint, opened.layout
    stored = {
        name: tensor.detach().to("cpu", torch_dtype(checkpoint.tensors[name].dtype))
        for name, tensor in layout.disassemble(block.index, block.parameters).items()
    }
    whole = layout.assemble(block.index, stored)
    with torch.no_grad():
        for name, tensor in whole.items():
            block.parameters[name].copy_(tensor)
    return stored, whole


def part_name(index: int) -> str:
    return f"block-{index:05d}"
