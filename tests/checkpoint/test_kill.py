"""SIGKILL at any moment, then resume: the same bytes as a run that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import ResumeError

from .samples import MakeCheckpoint, digests, in_child, was_killed

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
ASSEMBLY: dict[str, Any] = {"config_updates": {"pruned": True}, "shard_bytes": 300}
EXTRA: dict[str, str | bytes] = {"report.json": "{}", "b.bin": b"\0"}


def run(out: Path, source: Path, extra: dict[str, str | bytes] = EXTRA, **assembly: Any) -> None:
    """A small pruning run: each part depends on the one before as it is read from the disk."""
    if (out / "config.json").is_file() and not (out / ".secateur").exists():
        return
    checkpoint = Checkpoint.open(source)
    writer = CheckpointWriter(out, checkpoint, {"model": checkpoint.fingerprint()}, resume=True)
    if not writer.merged:
        compute(writer, checkpoint)
        writer.assemble(**{**ASSEMBLY, **assembly})
    writer.finish(extra=extra)


def compute(writer: CheckpointWriter, checkpoint: Checkpoint) -> None:
    if "allocation" not in writer.notes:
        writer.note("allocation", [0.5, 0.6])
    (writer.workspace / "gradients").write_bytes(b"\0" * 100)
    names, before = list(checkpoint.tensors), torch.zeros(())
    for part in range(3):
        if str(part) not in writer.parts:
            read = checkpoint.read(names[part::3])
            scaled = {name: (tensor * 2 + before).to(tensor.dtype) for name, tensor in read.items()}
            writer.write(str(part), scaled, {"loss": float(before)})
        before = sum((tensor.double().sum() for tensor in writer.read(str(part)).values()), torch.zeros(()))


def run_until_change(number: int, out: Path, source: Path) -> None:
    """Kill this very process just before its `number`-th change to the disk (no harm in between reads)."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES or (event == "open" and arguments[2] & os.O_CREAT):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(out, source)


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint, quick_folder: Path) -> Path:
    return make_checkpoint(quick_folder / "source", shards=2)


@pytest.fixture
def expected(source: Path, quick_folder: Path) -> dict[str, str]:
    run(quick_folder / "uninterrupted", source)
    return digests(quick_folder / "uninterrupted")


def test_killed_before_each_change_to_the_disk(source: Path, expected: dict[str, str], quick_folder: Path):
    """Every step of the whole run once, from the first mkdir to the last rmdir."""
    out, before = quick_folder / "out", digests(source)
    number = 0
    while was_killed(in_child(partial(run_until_change, number, out, source))):
        refuses_another_recipe(out, source)
        run(out, source)
        assert digests(out) == expected, f"killed before change {number}"
        shutil.rmtree(out)
        number += 1
    assert number > 60
    assert digests(source) == before


def refuses_another_recipe(out: Path, source: Path) -> None:
    """As long as anything of a run is there to be resumed."""
    before = digests(out)
    if any(name.startswith(".secateur/parts/") for name in before):
        with pytest.raises(ResumeError, match=r'model: .* -> "another"'):
            CheckpointWriter(out, Checkpoint.open(source), {"model": "another"}, resume=True)
        assert digests(out) == before


def test_another_way_to_finish_leaves_no_mixture(source: Path, expected: dict[str, str], quick_folder: Path):
    """Killed inside `finish`, which then gets other arguments: the old result or the new one."""
    one_file = {"shard_bytes": 10_000, "extra": {"report.json": "[]"}}
    run(quick_folder / "one file", source, **one_file)
    allowed, seen, out, number = [digests(quick_folder / "one file"), expected], [], quick_folder / "out", 30
    while was_killed(in_child(partial(run_until_change, number, out, source))):
        run(out, source, **one_file)
        seen.append(digests(out))
        assert seen[-1] in allowed, f"killed before change {number}"
        shutil.rmtree(out)
        number += 2
    assert all(result in seen for result in allowed)


def test_killed_again_and_again(source: Path, expected: dict[str, str], quick_folder: Path):
    """Each attempt gets a little further than the one before."""
    out = quick_folder / "out"
    for number in range(5, 10_000, 5):
        if not was_killed(in_child(partial(run_until_change, number, out, source))):
            break
    assert digests(out) == expected


def test_killed_at_random_moments(source: Path, expected: dict[str, str], tmp_path: Path):
    """By the clock, on a disk: also inside of writes."""
    generator, out = random.Random(0), tmp_path / "out"
    begun = time.monotonic()
    assert not was_killed(in_child(partial(run, out, source)))
    duration = time.monotonic() - begun
    kills = 0
    for _ in range(12):
        shutil.rmtree(out)
        child = in_child(partial(run, out, source))
        time.sleep(generator.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        kills += was_killed(child)
        run(out, source)
        assert digests(out) == expected
    assert kills > 0
