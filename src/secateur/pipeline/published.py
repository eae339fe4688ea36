"""What lies in an output folder beside the weights of the blocks."""

from __future__ import annotations

import json
from pathlib import Path

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


def copy_outer(opened: Opened, writer: CheckpointWriter) -> None:
    """Embeddings, norm, head and whatever belongs to no module go over unchanged."""
    names = [*opened.layout.outer_names(), *opened.layout.untouched]
    if "outer" not in writer.parts:
        writer.write("outer", opened.checkpoint.read(names), {})
