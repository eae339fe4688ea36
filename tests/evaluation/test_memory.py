"""Memory readings against allocations of a known size, in this process and in children."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from secateur.core.errors import InputError, SecateurError
from secateur.evaluation import memory
from secateur.evaluation.memory import (
    PeakMemory,
    available_memory_bytes,
    machine_facts,
    peak_memory_bytes,
    run_measured,
)

MEGABYTE = 1_000_000
ALLOCATE = "import sys; data = bytearray(int(sys.argv[1])); print('done')"

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
posix = pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")


def occupy(size_bytes: int) -> torch.Tensor:
    return torch.ones(size_bytes, dtype=torch.uint8)


@linux
def test_the_peak_of_a_block_is_seen_after_it_is_freed():
    with PeakMemory() as idle:
        pass
    with PeakMemory() as busy:
        occupy(300 * MEGABYTE)
    assert busy.resident_bytes - idle.resident_bytes >= 290 * MEGABYTE
    assert busy.device_bytes is None


@linux
def test_a_block_below_an_earlier_peak_is_sampled():
    occupy(400 * MEGABYTE)
    with PeakMemory() as outer, PeakMemory(interval_seconds=0.001) as inner:
        data = occupy(150 * MEGABYTE)
        time.sleep(0.3)
        del data
    below = peak_memory_bytes() - 200 * MEGABYTE
    assert inner.resident_bytes <= outer.resident_bytes < below
    assert inner.resident_bytes >= 150 * MEGABYTE


def test_the_process_peak_never_falls():
    before = peak_memory_bytes()
    occupy(10 * MEGABYTE)
    assert peak_memory_bytes() >= before > MEGABYTE


def test_a_system_without_proc_falls_back(monkeypatch):
    monkeypatch.setattr(memory, "_proc_field", lambda file, field: None)
    assert peak_memory_bytes() > MEGABYTE
    assert available_memory_bytes() > MEGABYTE


@posix
def test_a_child_is_measured_alone_however_large_its_parent():
    ballast = occupy(300 * MEGABYTE)
    small = run_measured([sys.executable, "-S", "-c", ALLOCATE, "0"])
    large = run_measured([sys.executable, "-S", "-c", ALLOCATE, str(200 * MEGABYTE)])
    assert small.peak_bytes < 100 * MEGABYTE < ballast.numel()
    assert 195 * MEGABYTE < large.peak_bytes - small.peak_bytes < 210 * MEGABYTE
    assert small.seconds > 0


@posix
def test_output_of_the_child_leaves_stdout_alone(capfd):
    run_measured([sys.executable, "-S", "-c", ALLOCATE, "0"])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "done\n")
    run_measured([sys.executable, "-S", "-c", ALLOCATE, "0"], stdout=None)
    assert capfd.readouterr().out == "done\n"


@posix
def test_environment_and_folder_of_the_child(tmp_path):
    code = "import os, pathlib; pathlib.Path('note').write_text(os.environ['WORD'])"
    run_measured([sys.executable, "-S", "-c", code], env={"WORD": "pear", "PATH": ""}, cwd=tmp_path)
    assert (tmp_path / "note").read_text() == "pear"


@posix
@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_a_failing_child_is_an_error(code):
    with pytest.raises(SecateurError, match=r"exit status (3|-9)"):
        run_measured([sys.executable, "-S", "-c", code])


def test_an_unknown_command_is_bad_input():
    with pytest.raises(InputError, match="no-such-program"):
        run_measured(["no-such-program"])


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert memory._container_free_bytes(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_free_bytes(tmp_path) is None
    assert memory._container_free_bytes(tmp_path / "absent") is None


def test_machine_facts_name_the_machine():
    facts = machine_facts()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > available_memory_bytes() * 0.1
    assert isinstance(facts["cpu"], str)
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())
