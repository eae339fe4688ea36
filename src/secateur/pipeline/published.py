"""What lies in an output folder beside the weights of the blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import secateur
from secateur.anatomy.resized import is_stock
from secateur.checkpoint.durable import write_bytes
from secateur.checkpoint.writer import CheckpointWriter
from secateur.loading import REMOTE_CODE
from secateur.pipeline.opened import Opened
from secateur.report.card import model_card
from secateur.report.html import render
from secateur.report.model import Report

__all__ = ["add_code", "copy_outer", "published_files"]


def published_files(report: Report, opened: Opened) -> dict[str, str | bytes]:
    """Report and card."""
    return {
        "report.json": report.model_dump_json(indent=2) + "\n",
        "report.html": render(report),
        "README.md": model_card(report, opened.folder),
    }


def add_code(folder: Path) -> None:
    """Give models of blocks that differ the file that loads them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not is_stock(config):
        code = Path(secateur.__file__).parent / "loading" / REMOTE_CODE
        write_bytes(folder / REMOTE_CODE, code.read_bytes())


def copy_outer(
    opened: Opened,
    writer: CheckpointWriter,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Embeddings, norm and head go over unchanged, or as `change` makes them by their names on disk; what
    belongs to no module always goes over unchanged."""
    if "outer" in writer.parts:
        return
    layout, checkpoint = opened.layout, opened.checkpoint
    outer = checkpoint.read(layout.outer_names())
    changed = change(outer) if change else outer
    writer.write("outer", {**changed, **checkpoint.read(layout.untouched)}, {})
