"""Small text files, complete or not there at all."""

from __future__ import annotations

from pathlib import Path

from secateur.checkpoint.durable import write_bytes
from secateur.core.errors import OutputError

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 so that a reader sees the old file or the whole new one. Raises `OutputError`."""
    try:
        write_bytes(path, text.encode())
    except OutputError as error:
        raise OutputError(error.seen, "a writable folder with room", "choose another path") from error
