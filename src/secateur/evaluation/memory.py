"""Memory of this process, of a child process and of the machine, without dependencies."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.core.errors import InputError, SecateurError

__all__ = [
    "ChildRun",
    "PeakMemory",
    "available_memory_bytes",
    "machine_facts",
    "peak_memory_bytes",
    "run_measured",
]

LAUNCHER = Path(__file__).with_name("_child.py")
STDERR = 2
Reader = Callable[[], "int | None"]
CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the reclaimable part of the use: of the second and of the first version of cgroups."""


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process since it started; `None` where the system does not tell."""
    peak = _proc_field(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes() -> int:
    """Memory that new allocations can take without swapping, within the limit of the container if any.

    Where the system does not tell what is free: all of its memory, or no limit at all.
    """
    free = _proc_field(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        free = _installed_bytes() or sys.maxsize
    limit = _container_free_bytes(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, limit)


def machine_facts() -> dict[str, Any]:
    """Where a measurement took place.

    Returns:
        `cpu` (model), `cores` this process may use, `memory_bytes` installed, `gpu` (model or `None`) and
        `threads` that torch computes with. What is not known is `None`.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _installed_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


class PeakMemory:
    """Peak memory of what happens inside `with`; resets no counter, so uses may nest.

    Exact when the block goes above everything before it, otherwise the highest of regular samples.

    Attributes:
        resident_bytes: peak resident memory of this process, `None` where the system does not tell.
        device_bytes: peak of what torch allocated on the CUDA device, `None` on other devices.

    >>> with PeakMemory() as peak:
    ...     numbers = list(range(1000))
    >>> peak.resident_bytes > 0
    True
    """

    def __init__(self, device: torch.device | str = "cpu", *, interval_seconds: float = 0.02) -> None:
        self.resident_bytes: int | None = None
        self.device_bytes: int | None = None
        self._resident = _Highest(peak_memory_bytes, _resident_bytes)
        self._device = _Highest(*_device_readers(torch.device(device)))
        self._interval_seconds = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="peak memory")

    def __enter__(self) -> PeakMemory:
        self._resident.start()
        self._device.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self.resident_bytes = self._resident.stop()
        self.device_bytes = self._device.stop()

    def _sample(self) -> None:
        while not self._done.wait(self._interval_seconds):
            self._resident.sample()
            self._device.sample()


class _Highest:
    """The highest value of a gauge between `start` and `stop`, from its all-time peak and from samples."""

    def __init__(self, peak: Reader, now: Reader) -> None:
        self._peak, self._now = peak, now
        self._before: int | None = None
        self._highest: int | None = None

    def start(self) -> None:
        self._before = self._peak()
        self.sample()

    def sample(self) -> None:
        value = self._now()
        if value is not None:
            self._highest = max(value, self._highest or 0)

    def stop(self) -> int | None:
        self.sample()
        after = self._peak()
        if after is None or self._highest is None or (self._before is not None and after > self._before):
            return after
        return self._highest


class ChildRun(NamedTuple):
    """What a child process took: wall clock, and peak resident memory of it and its own children."""

    seconds: float
    peak_bytes: int


def run_measured(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int | None = STDERR,
) -> ChildRun:
    """Run a command to its end and measure it by `wait4`.

    Args:
        argv: the command and its arguments; no shell.
        env: environment of the child, by default that of this process.
        stdout: file descriptor for the child's output, by default this process's stderr; `None`: its stdout.

    Raises:
        InputError: no such command, or a system without `wait4`.
        SecateurError: the command failed.
    """
    if shutil.which(argv[0]) is None:
        raise InputError(f"no command {argv[0]!r}", "a program on the PATH")
    if not hasattr(os, "wait4"):
        raise InputError(f"{platform.system()} cannot measure a child process", "Linux or macOS")
    answer = _launch(argv, env, cwd, stdout)
    if not answer or answer["exit_status"]:
        status = answer.get("exit_status", "unknown")
        raise SecateurError(f"{' '.join(argv)!r} ended with exit status {status}")
    return ChildRun(answer["seconds"], answer["peak_bytes"])


def _launch(
    argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, stdout: int | None
) -> dict[str, Any]:
    """The answer of the launcher, empty when it was killed."""
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(writer), *argv]
    with open(reader, encoding="utf-8") as answer:
        try:
            process = subprocess.Popen(command, env=env, cwd=cwd, stdout=stdout, pass_fds=(writer,))
        finally:
            os.close(writer)
        with process:
            text = answer.read()
    return dict(json.loads(text)) if text else {}


def _device_readers(device: torch.device) -> tuple[Reader, Reader]:
    if device.type != "cuda":
        return (lambda: None), (lambda: None)
    return (lambda: torch.cuda.max_memory_allocated(device)), (lambda: torch.cuda.memory_allocated(device))


def _resident_bytes() -> int | None:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _proc_field(file: Path, field: str) -> int | None:
    """A line such as `MemAvailable:  12345 kB`, in bytes."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 if values else None


def _container_free_bytes(root: Path) -> int | None:
    """What the memory limit of this container leaves, files that can be dropped counted as free."""
    for limit_name, use_name, cache_name in CGROUPS:
        limit, use = _integer(root / limit_name), _integer(root / use_name)
        if limit is not None and use is not None:
            return max(limit - use + _cgroup_cache(root / limit_name, cache_name), 0)
    return None


def _cgroup_cache(limit_file: Path, name: str) -> int:
    try:
        lines = limit_file.with_name("memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _integer(file: Path) -> int | None:
    """The number in a file; `None` without the file or where it says `max`."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _installed_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine() or None
