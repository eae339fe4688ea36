"""Blocks and parts of blocks away: what stays is written under new numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.model import Anatomy
from secateur.anatomy.parts import Parts
from secateur.anatomy.shorter import shorter_config
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Run

__all__ = ["Remaining"]


@dataclass(frozen=True)
class Remaining:
    """What stays of a model.

    Attributes:
        kept: blocks of the source, in order.
        config_updates: keys of config.json that change.
        anatomy: of the result.
    """

    kept: Sequence[int]
    config_updates: dict[str, Any]
    anatomy: Anatomy

    @classmethod
    def of(
        cls, opened: Opened, kept: Sequence[int], skips: Mapping[int, Sequence[str]], parts: Parts
    ) -> Remaining:
        """Without the blocks that are not `kept`, and without the parts that others lose.

        Raises:
            AnatomyError: blocks that change with their place.
        """
        return cls(kept, *shorter_config(opened.checkpoint.config, opened.anatomy, kept, skips, parts))

    def layout(self, opened: Opened) -> FileLayout:
        """Of its files."""
        return FileLayout(self.anatomy, dict.fromkeys(opened.checkpoint.tensors))

    def write(self, run: Run) -> frozenset[str]:
        """Write all blocks that are not there yet; the tensors of the source that are gone."""
        checkpoint, source = run.opened.checkpoint, run.opened.layout
        layout = self.layout(run.opened)
        done = run.finished()
        for new, old in enumerate(self.kept):
            if new not in done:
                whole = source.assemble(old, checkpoint.read(source.block_names(old)))
                run.keep(new, layout.disassemble(new, whole), {})
        names = {name for block in run.opened.anatomy.blocks for name in source.block_names(block.index)}
        stay = {name for new in range(len(self.kept)) for name in layout.block_names(new)}
        return frozenset(names - stay)
