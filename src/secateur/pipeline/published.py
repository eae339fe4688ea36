"""What lies in an output folder beside the weights of the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secateur
from secateur.anatomy.resized import is_stock
from secateur.checkpoint.writer import CheckpointWriter
from secateur.loading import REMOTE_CODE
from secateur.pipeline.opened import Opened
from secateur.report.card import model_card
from secateur.report.html import render
from secateur.report.model import Report

__all__ = ["copy_outer", "published_files"]


def published_files(
    report: Report, opened: Opened, config_updates: Mapping[str, Any] | None = None
) -> dict[str, str | bytes]:
    """Report and card; models of blocks that differ bring their loading code along."""
    files: dict[str, str | bytes] = {
        "report.json": report.model_dump_json(indent=2) + "\n",
        "report.html": render(report),
        "README.md": model_card(report, opened.folder),
    }
    if not is_stock({**opened.checkpoint.config, **(config_updates or {})}):
        files[REMOTE_CODE] = (Path(secateur.__file__).parent / "loading" / REMOTE_CODE).read_bytes()
    return files


def copy_outer(opened: Opened, writer: CheckpointWriter) -> None:
    """Embeddings, norm, head and whatever belongs to no module go over unchanged."""
    names = [*opened.layout.outer_names(), *opened.layout.untouched]
    if "outer" not in writer.parts:
        writer.write("outer", opened.checkpoint.read(names), {})
