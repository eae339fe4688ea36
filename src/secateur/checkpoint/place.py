"""Whether an output folder can take a result, asked before anything is created."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from secateur.core.errors import OutputError

__all__ = ["bytes_below", "entries", "require_disk", "require_place"]


def require_place(out: Path, source: Path) -> None:
    """Raises `OutputError` when `out` is the source or inside it, is no folder, or cannot be written."""
    absolute, forbidden = out.resolve(), source.resolve()
    if absolute == forbidden or forbidden in absolute.parents:
        where = "the same folder as" if absolute == forbidden else "inside"
        raise OutputError(f"{out} is {where} the source", "another folder", "the source is never changed")
    existing = _existing(absolute)
    if not existing.is_dir():
        raise OutputError(f"{existing} is a file", "a folder to write to", "choose another output folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise OutputError(
            f"{existing} cannot be written", "a folder with write permission", "choose another output folder"
        )


def require_disk(out: Path, needed_bytes: int) -> None:
    """Raises `OutputError` when the disk below `out` has less than this free."""
    free = shutil.disk_usage(_existing(out.resolve())).free
    if free < needed_bytes:
        raise OutputError(
            f"{free / 1e9:.2f} GB are free for {out}",
            f"{needed_bytes / 1e9:.2f} GB (parts and merged files lie side by side for a while)",
            "free the disk or choose another output folder",
        )


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and its folders; 0 when there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing when there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if os.path.exists(place))
