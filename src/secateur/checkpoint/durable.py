"""Files that are complete and on disk, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from secateur.core.errors import OutputError

__all__ = ["COPY_BYTES", "copy_range", "replacing", "staged", "sync_folder", "write_bytes"]

COPY_BYTES = 8 << 20


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is whole and flushed to the disk.

    Killed at any moment, `path` holds the old content or the new one.

    Raises:
        OutputError: the disk is full or refuses the file.
    """
    with staged(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """`replacing` for whoever opens the file itself: gives the name to write to, and the file its own name
    when it is whole and flushed to the disk. An exception leaves nothing behind.

    Raises:
        OutputError: as `replacing`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path} ({error.strerror or error})", "", "free the disk, then add --resume"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut (where the system can)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """`replacing` for content that is at hand."""
    with replacing(path) as file:
        file.write(content)


def copy_range(source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
    """Append bytes `start` to `stop` of one file to another, holding 8 MiB at most."""
    source.seek(start)
    left = stop - start
    while left:
        piece = source.read(min(left, COPY_BYTES))
        if not piece:
            raise OSError(f"{source.name} ends {left} bytes early")
        target.write(piece)
        left -= len(piece)
