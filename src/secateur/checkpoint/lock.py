"""One process a folder: a lock that the kernel takes back when its process ends, however it ends."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from secateur.core.errors import OutputError

if sys.platform != "win32":
    import fcntl

__all__ = ["Lock", "require_unlocked"]

FILE = "lock"
logger = logging.getLogger(__name__)


class Lock:
    """The exclusive lock on a workspace, held until `close` or the end of the process.

    Where the system or the file system has no locks, this is said at debug level and nothing is locked.

    Args:
        folder: the workspace, which exists.

    Raises:
        OutputError: another process, or another writer of this one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = _locked(folder / FILE)
        if self._file is None:
            logger.debug("%s is not locked: there are no locks here", folder)
            return
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())
        self._file.flush()

    def close(self) -> None:
        """Let others write; the file stays until its folder goes."""
        if self._file is not None:
            self._file.close()


def require_unlocked(folder: Path) -> None:
    """Raises `OutputError` while a process holds the lock on `folder`; creates nothing."""
    try:
        file = (folder / FILE).open("rb")
    except OSError:  # it is not there, or will be missed when it is taken
        return
    with file:
        _flock(file, folder, shared=True)


def _locked(path: Path) -> IO[bytes] | None:
    """The open lock file, or `None` where there are no locks."""
    while True:
        with ExitStack() as opened:
            file = opened.enter_context(path.open("a+b"))
            if not _flock(file, path.parent):
                return None
            if _lies_at(file, path):  # else whoever held it has removed it: it would keep nobody out
                opened.pop_all()
                return file


def _flock(file: IO[bytes], folder: Path, *, shared: bool = False) -> bool:
    """Lock without waiting; whether the file system can."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _taken(folder, file) from error
    except OSError:
        return False
    return True


def _lies_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(folder: Path, file: IO[bytes]) -> OutputError:
    file.seek(0)
    process = file.read().decode() or "unknown"
    return OutputError(
        f"{folder.parent} is being written by process {process}",
        "one process a folder",
        "wait for it or end it, then add --resume, or choose another output folder",
    )
