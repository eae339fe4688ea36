"""Two processes under torchrun choose the same masks as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 200


ONE = [sys.executable, "-m", "secateur"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "secateur"]


def prune_both_ways(tmp_path: Path, *options: str) -> list[Path]:
    """Prune with one process and with two; the folders that come out."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, num_key_value_heads=4)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    common = [str(model), "--calibration", str(text), "--samples", "6", "--length", "32", "--batch-size", "2"]
    plain = ["--evaluation-windows", "0", "--no-measure-speed", "--no-check-loading", *options]
    folders = []
    for name, start in (("one", ONE), ("two", TWO)):
        folders.append(tmp_path / name)
        command = [*start, "prune", *common, *plain, "-o", str(folders[-1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folders


def test_same_masks_with_two_processes(tmp_path: Path) -> None:
    folders = prune_both_ways(tmp_path, "--method", "sparsegpt", "--sparsity", "0.5")
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, two[name] == 0), name


def test_same_search_with_two_processes(tmp_path: Path) -> None:
    options = ["tokens=[64,192]", "survivors=[2]", "offspring=5", "generations=2", "iterations=1"]
    named = [word for option in options for word in ("-O", option)]
    folders = prune_both_ways(tmp_path, "--method", "tyr", "--sparsity", "0.3", *named)
    rows = [json.loads((folder / "search.json").read_text())["iterations"][0] for folder in folders]
    assert rows[0]["levels"] == rows[1]["levels"] != [0] * 6
    fitness = [[generation["fitness"] for generation in row["generations"]] for row in rows]
    assert fitness[0] == pytest.approx(fitness[1], rel=1e-3)
