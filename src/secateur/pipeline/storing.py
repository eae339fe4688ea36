"""The same weights stored otherwise: packed, or unpacked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import secateur
from secateur.checkpoint.packing import DENSE
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.progress import Progress
from secateur.pipeline.opened import Opened, open_model
from secateur.pipeline.published import copy_outer
from secateur.pipeline.state import part_name
from secateur.storage.packer import packer_for

__all__ = ["write_stored"]


def write_stored(opened: Opened, out: Path, *, format: str, progress: Progress) -> dict[str, Any]:
    """Write a checkpoint whose tensors equal those of `opened` bit for bit, block by block through a journal:
    a killed export goes on when it is repeated.

    Args:
        format: `dense` or one of packed tensors; what would not become smaller stays as it is.

    Raises:
        OutputError: a place that cannot be written, or is taken.
    """
    checkpoint = opened.checkpoint
    marks = {
        "export": format,
        "secateur": secateur.__version__,
        "model_fingerprint": checkpoint.fingerprint(),
    }
    pack = packer_for(format)
    with CheckpointWriter(out, checkpoint, marks, resume=True, pack=pack) as writer:
        if not writer.merged:
            with progress.task(f"storing as {format}", len(opened.anatomy.blocks)) as task:
                for block in opened.anatomy.blocks:
                    if part_name(block.index) not in writer.parts:
                        stored = checkpoint.read(opened.layout.block_names(block.index))
                        writer.write(part_name(block.index), stored, {})
                    task.advance()
            copy_outer(opened, writer)
        writer.finish()
    written = open_model(out)
    return _facts(opened, written, format)


def _facts(opened: Opened, written: Opened, format: str) -> dict[str, Any]:
    before, after = opened.checkpoint, written.checkpoint
    packed = len(after.formats)
    if format == DENSE:
        notes = ["the weights equal those that were packed, bit for bit"]
    else:
        plain = len(after.tensors) - packed
        notes = [
            f"{packed} tensors are packed; {plain} stay as they are, which is no larger",
            f"{after.nbytes / after.dense_nbytes:.3f} of the bytes of the unpacked weights",
            "transformers loads it after `import secateur`; others need secateur export --format dense",
        ]
    if not packed and format != DENSE:
        notes = ["nothing would become smaller: these are ordinary files"]
    return {
        "parameters": after.parameters,
        "parameters_before": before.parameters,
        "bytes": after.nbytes,
        "bytes_before": before.nbytes,
        "tensors_packed": packed,
        "notes": notes,
    }
