"""Compile `kernel.cpp` once a user, keep it, and load it.

The kernel is plain C++ without headers of torch or Python: it compiles in seconds, needs no ninja, and serves
every version of both. It is linked without an OpenMP of its own and finds that of torch in the process, so
that both share one pool of threads. Which instructions it uses is decided when it runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.core.errors import SecateurError

__all__ = ["NoKernelError", "cache_folder", "kept_file", "library", "why_missing"]

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILE = ("-std=c++17", "-O3", "-fPIC", "-fopenmp")
COMPILERS = ("g++", "c++")
WHOLE = b"secateur"
"""Behind a library that was written to its end: to load one that was cut short would kill the process."""
SECONDS = 300
"""Longest build that is waited for."""

_LONG, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_MATRIX = (_LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT)
_ARGUMENTS = {
    "secateur_path": (),
    "secateur_multiply": (*_MATRIX, _INT, _INT, _POINTER, _LONG, _POINTER, _INT, _INT),
    "secateur_unpack": (*_MATRIX, _INT, _LONG, _LONG, _POINTER, _INT, _INT, _INT),
}


class NoKernelError(SecateurError):
    """Why there is no compiled kernel; everything works without, more slowly."""


@functools.cache
def _loaded() -> ctypes.CDLL | NoKernelError:
    try:
        return _open_or_build()
    except NoKernelError as reason:
        return reason


def library() -> ctypes.CDLL | None:
    """The compiled kernel, built if this user has none; None where it cannot be. Tried once a process."""
    loaded = _loaded()
    return None if isinstance(loaded, NoKernelError) else loaded


def why_missing() -> str | None:
    """Why `library` gives None, or None."""
    loaded = _loaded()
    return str(loaded) if isinstance(loaded, NoKernelError) else None


def cache_folder() -> Path:
    """Where the kernel is kept: `secateur` in `$XDG_CACHE_HOME` or `~/.cache`. Raises `NoKernelError`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    except RuntimeError as error:
        raise NoKernelError(f"nowhere to keep the compiled kernel ({error}); set XDG_CACHE_HOME") from error


def kept_file() -> Path:
    """Where the kernel of this source is kept, built or not."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(" ".join((*COMPILE, platform.machine())).encode())
    return cache_folder() / f"kernel-{key.hexdigest()[:16]}.so"


def _open_or_build() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise NoKernelError(f"packed weights are computed with on Linux only, not on {sys.platform}")
    kept = kept_file()
    if kept.is_file() and kept.read_bytes().endswith(WHOLE):
        try:
            return _open(kept)
        except (OSError, AttributeError):  # of another machine with the same home, or something else
            pass
    return _build(kept)


def _build(kept: Path) -> ctypes.CDLL:
    """Compile in a folder of its own and move the result: killed or done twice at a time, it harms nobody."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise NoKernelError("no C++ compiler (g++, or name one in CXX)")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="build-") as scratch:
            made = Path(scratch) / kept.name
            part = made.with_suffix(".o")
            _run(compiler, *COMPILE, "-c", str(SOURCE), "-o", str(part))
            _run(compiler, "-shared", str(part), "-o", str(made))
            with made.open("ab") as file:
                file.write(WHOLE)
                file.flush()
                os.fsync(file.fileno())
            opened = _open(made)
            os.replace(made, kept)
            return opened
    except OSError as error:
        raise NoKernelError(
            f"the compiled kernel cannot be kept in {kept.parent} or loaded: {error}"
        ) from error


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoKernelError(f"{command[0]} took more than {SECONDS} seconds") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NoKernelError(f"{command[0]} fails: {lines[0]}")


def _open(file: Path) -> ctypes.CDLL:
    """Raises `OSError` where the file is no library, or torch brings no OpenMP that it could use."""
    import torch  # noqa: F401  (brings OpenMP into the process)

    opened = ctypes.CDLL(str(file))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, _INT if name == "secateur_path" else None
    return opened
