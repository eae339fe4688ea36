"""Two processes, under torchrun or as it starts them, choose as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import together
from safetensors.torch import load_file
from small_runs import text_beside
from tiny_models import save_tiny

from secateur.cli.app import run


def arguments(tmp_path: Path, *options: str) -> list[str]:
    """A command that prunes a tiny model, all but where to."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, num_key_value_heads=4)
    data = ["--calibration", text_beside(model), "--samples", "6", "--length", "32", "--batch-size", "2"]
    quick = ["--evaluation-windows", "0", "--no-measure-speed", "--no-check-loading"]
    return ["prune", str(model), *data, *quick, *options]


def test_same_masks_with_two_processes(tmp_path: Path) -> None:
    command = arguments(tmp_path, "--method", "sparsegpt", "--sparsity", "0.5")
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [*launcher, "-m", "secateur", *command, "-o", str(tmp_path / "two")]
    done = subprocess.run(both, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, two[name] == 0), name


def test_same_search_with_two_processes(tmp_path: Path) -> None:
    options = ["tokens=[64,192]", "survivors=[2]", "offspring=5", "generations=2", "iterations=1"]
    named = [word for option in options for word in ("-O", option)]
    command = arguments(tmp_path, "--method", "tyr", "--sparsity", "0.3", *named)
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    together(2, succeed, [*command, "-o", str(tmp_path / "two")])
    found = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two")]
    rows = [record["iterations"][0] for record in found]
    assert rows[0]["levels"] == rows[1]["levels"] != [0] * 6
    fitness = [[generation["fitness"] for generation in row["generations"]] for row in rows]
    assert fitness[0] == pytest.approx(fitness[1], rel=1e-3)


def succeed(command: list[str]) -> None:
    assert run(command) == 0
