"""Two processes do not write one folder; a process that is gone, however it went, keeps nobody out."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from secateur.checkpoint import lock
from secateur.checkpoint.lock import Lock, require_unlocked
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import OutputError

from .samples import MakeCheckpoint

WRITER = """
import sys
from pathlib import Path
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.writer import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), Checkpoint.open(sys.argv[2]), {}, resume=True)
print("ready", flush=True)
sys.stdin.readline()
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks on Windows")


@contextmanager
def another_process(out: Path, source: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes `out` until it is told to end or killed."""
    command = [sys.executable, "-c", WRITER, str(out), str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_second_process_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    checkpoint = Checkpoint.open(source)
    with another_process(out, source) as process:
        says = f"out is being written by process {process.pid}; expected one process a folder; wait for it"
        for resume in (False, True):
            with pytest.raises(OutputError, match=says) as caught:
                CheckpointWriter(out, checkpoint, {}, resume=resume)
            assert caught.value.exit_code == 2
            with pytest.raises(OutputError, match=says):
                CheckpointWriter.check(out, checkpoint, resume=resume)
        process.send_signal(signal.SIGKILL)
        process.wait()
        CheckpointWriter.check(out, checkpoint, resume=True)
        with CheckpointWriter(out, checkpoint, {}, resume=True) as writer:
            writer.write("all", checkpoint.read(checkpoint.tensors), {})
            writer.finish()
    assert not (out / ".secateur").exists()


def test_a_writer_that_failed_lets_go(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, out = Checkpoint.open(make_checkpoint()), tmp_path / "out"
    with pytest.raises(ValueError, match="never written"), CheckpointWriter(out, checkpoint, {}) as writer:
        writer.finish()
    with CheckpointWriter(out, checkpoint, {}, resume=True):
        pass


def test_a_lock_names_its_process(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    with pytest.raises(OutputError, match=f"process {os.getpid()};"):
        require_unlocked(tmp_path)
    held.close()
    require_unlocked(tmp_path)
    Lock(tmp_path).close()


def test_nothing_is_created_by_asking(tmp_path: Path) -> None:
    require_unlocked(tmp_path)
    require_unlocked(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_removed_file_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that held it has finished and removed it between opening and locking."""
    flock, times = lock._flock, []

    def removing(*arguments: object, **options: object) -> bool:
        if not times:
            (tmp_path / "lock").unlink()
        times.append(1)
        return flock(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lock, "_flock", removing)
    held = Lock(tmp_path)
    assert len(times) == 2
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    held.close()


def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.DEBUG, "secateur"):
        first, second = Lock(tmp_path), Lock(tmp_path)
    assert "not locked" in caplog.text
    first.close()
    second.close()
