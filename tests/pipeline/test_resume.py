"""A run killed with SIGKILL at any moment goes on with --resume and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import save_tiny

from secateur.cli.app import run
from secateur.core.errors import ResumeError
from secateur.pipeline.prune import prune_checkpoint
from secateur.recipe import Calibration, Recipe

TEXT = "The gardener cut the old branches of the apple tree.\n" * 200
VOLATILE = {"report.json", "report.html", "README.md"}
SLOWDOWN = """
import sys, time
import secateur.checkpoint.writer as w
original = w.CheckpointWriter.write
def slow(self, *arguments):
    time.sleep(0.05)
    original(self, *arguments)
    print(flush=True)
    time.sleep(0.05)
w.CheckpointWriter.write = slow
from secateur.cli.app import run
sys.exit(run(sys.argv[1:]))
"""

PAUSE = """
import sys
import secateur.checkpoint.writer as w
original = w.CheckpointWriter.write
def pausing(self, *arguments):
    original(self, *arguments)
    print(flush=True)
    sys.stdin.readline()
w.CheckpointWriter.write = pausing
from secateur.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    base = ["prune", str(model), "-o", str(out), "--method", "sparsegpt", "--sparsity", "0.6"]
    data = ["--calibration", str(text), "--samples", "8", "--length", "32", "--evaluation-windows", "2"]
    return [*base, *data, "--allocation", "owl", "--no-measure-speed", "--no-check-loading", *more]


def weights(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name not in VOLATILE
    }


def run_and_kill(command: list[str], after_parts: int, delay_seconds: float) -> bool:
    """Start the run, kill it some time after a number of parts; whether it was killed before its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWDOWN, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    for _ in range(after_parts):
        if not process.stdout.readline():
            break
    time.sleep(delay_seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_runs_end_in_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    assert run(arguments(model, text, tmp_path / "whole")) == 0
    expected = weights(tmp_path / "whole")
    chance = random.Random(5)
    out = tmp_path / "killed"
    for after_parts in (1, 2, 2):
        command = arguments(model, text, out, "--resume")
        assert run_and_kill(command, after_parts, chance.uniform(0, 0.1))
        assert not (out / "config.json").exists()
    assert run(arguments(model, text, out, "--resume")) == 0
    assert weights(out) == expected
    assert not (out / ".secateur").exists()
    assert os.listdir(out).count("report.json") == 1


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_second_run_into_one_folder_is_refused(
    more: list[str], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(model, text, tmp_path / "alone")) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-c", PAUSE, *arguments(model, text, out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as first:  # type: ignore[call-overload]
        first.stdout.readline()
        capsys.readouterr()
        assert run(arguments(model, text, out, *more)) == 2
        says = f"error: {out} is being written by process {first.pid}; expected one process a folder; "
        assert capsys.readouterr().err.startswith(says)
        first.communicate()
    assert first.returncode == 0
    assert weights(out) == weights(tmp_path / "alone")
    assert not (out / ".secateur").exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def recipe(model: Path, text: Path, **changes: object) -> Recipe:
    calibration = Calibration(source=str(text), samples=4, length=16)
    values = {"sparsity": 0.5, "method": "wanda", "evaluation_windows": 0, "measure_speed": False, **changes}
    return Recipe(model=str(model), calibration=calibration, **values)  # type: ignore[arg-type]


def test_a_changed_recipe_does_not_resume(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "secateur.pipeline.prune.copy_outer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(recipe(model, text), out)
    with pytest.raises(ResumeError, match=r"sparsity: 0\.5 -> 0\.6"):
        prune_checkpoint(recipe(model, text, sparsity=0.6), out, resume=True)
    report = prune_checkpoint(recipe(model, text), out, resume=True)
    assert report is not None
    assert report.sparsity == pytest.approx(0.5)
