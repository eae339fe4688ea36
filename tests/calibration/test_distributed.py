"""Two processes, started as by torchrun, end with the statistics of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import together
from safetensors.torch import load_file

from calibration import worker
from secateur.calibration.distributed import Group, local_device


def test_two_processes_end_with_the_sums_of_one(tmp_path: Path) -> None:
    """Shards of two and three windows: the gradients of one process have a chunk without a sequence."""
    together(2, worker.work, tmp_path)
    first, second = (load_file(tmp_path / f"process-{rank}.safetensors") for rank in range(2))
    alone = worker.results(worker.windows(), None, tmp_path / "alone")
    assert first.keys() == second.keys() == alone.keys()
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("error"):  # of the first batch of every process, so of other windows
            torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-9, msg=name)


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Group.from_environment(torch.device("cpu")) is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Group.from_environment(torch.device("cpu")) is None


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(torch.device("cuda")) == torch.device("cuda:3")
    assert local_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert local_device(torch.device("cpu")) == torch.device("cpu")
