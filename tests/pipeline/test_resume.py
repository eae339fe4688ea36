"""A run killed with SIGKILL at any moment goes on with --resume and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from elsewhere import PROCESSES
from small_runs import interrupted, text_beside
from tiny_models import save_tiny

from secateur.checkpoint.writer import CheckpointWriter
from secateur.cli.app import run
from secateur.core.errors import ResumeError
from secateur.pipeline import prune as pruning
from secateur.pipeline.prune import prune_checkpoint
from secateur.recipe import Calibration, Recipe

VOLATILE = {"report.json", "report.html", "README.md"}


def slowly(command: list[str], parts: Connection) -> None:
    """The run of a command, slower; tells of every part that it has written."""
    write = CheckpointWriter.write

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        write(*arguments)
        parts.send(None)
        time.sleep(0.05)

    CheckpointWriter.write = slow  # type: ignore[method-assign]
    sys.exit(run(command))


def pausing(command: list[str], parts: Connection) -> None:
    """The run of a command, which waits for an answer when it has written its first part."""
    write = CheckpointWriter.write

    def paused(*arguments: Any) -> None:
        CheckpointWriter.write = write  # type: ignore[method-assign]
        write(*arguments)
        parts.send(None)
        parts.recv()

    CheckpointWriter.write = paused  # type: ignore[method-assign]
    sys.exit(run(command))


@contextmanager
def started(how: Callable[..., None], command: list[str]) -> Iterator[tuple[BaseProcess, Connection]]:
    """A run in a process of its own, and the end of a pipe to it."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=how, args=(command, there))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        here.close()
        process.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=6)


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    base = ["prune", str(model), "-o", str(out), "--method", "sparsegpt", "--sparsity", "0.6"]
    data = [
        "--calibration",
        text_beside(model),
        "--samples",
        "8",
        "--length",
        "32",
        "--evaluation-windows",
        "2",
    ]
    return [*base, *data, "--allocation", "owl", "--no-measure-speed", "--no-check-loading", *more]


def weights(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name not in VOLATILE
    }


def run_and_kill(command: list[str], after_parts: int, delay_seconds: float) -> bool:
    """Start the run, kill it some time after a number of parts; whether it was killed before its end."""
    with started(slowly, command) as (process, parts):
        for _ in range(after_parts):
            parts.recv()
        time.sleep(delay_seconds)
        process.kill()
    return process.exitcode == -signal.SIGKILL


def test_killed_runs_end_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    assert run(arguments(model, tmp_path / "whole")) == 0
    expected = weights(tmp_path / "whole")
    chance = random.Random(5)
    out = tmp_path / "killed"
    for after_parts in (1, 2, 2):
        command = arguments(model, out, "--resume")
        assert run_and_kill(command, after_parts, chance.uniform(0, 0.1))
        assert not (out / "config.json").exists()
    assert run(arguments(model, out, "--resume")) == 0
    assert weights(out) == expected
    assert not (out / ".secateur").exists()
    assert os.listdir(out).count("report.json") == 1


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_second_run_into_one_folder_is_refused(
    more: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(model, tmp_path / "alone")) == 0
    out = tmp_path / "out"
    with started(pausing, arguments(model, out)) as (first, parts):
        parts.recv()
        capsys.readouterr()
        assert run(arguments(model, out, *more)) == 2
        says = f"error: {out} is being written by process {first.pid}; expected one process a folder; "
        assert capsys.readouterr().err.startswith(says)
        parts.send(None)
    assert first.exitcode == 0
    assert weights(out) == weights(tmp_path / "alone")
    assert not (out / ".secateur").exists()


def recipe(model: Path, **changes: object) -> Recipe:
    calibration = Calibration(source=text_beside(model), samples=4, length=16)
    values = {"sparsity": 0.5, "method": "wanda", "evaluation_windows": 0, "measure_speed": False, **changes}
    return Recipe(model=str(model), calibration=calibration, **values)  # type: ignore[arg-type]


def test_a_changed_recipe_does_not_resume(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with interrupted(0, pruning, "copy_outer"):
        prune_checkpoint(recipe(model), out)
    with pytest.raises(ResumeError, match=r"sparsity: 0\.5 -> 0\.6"):
        prune_checkpoint(recipe(model, sparsity=0.6), out, resume=True)
    report = prune_checkpoint(recipe(model), out, resume=True)
    assert report is not None
    assert report.sparsity == pytest.approx(0.5)
