"""Two processes under torchrun choose the same masks as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import save_tiny

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 200


def test_same_masks_with_two_processes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    common = [str(model), "--calibration", str(text), "--samples", "6", "--length", "32", "--batch-size", "2"]
    plain = ["--evaluation-windows", "0", "--no-measure-speed", "--sparsity", "0.5"]
    one = [sys.executable, "-m", "secateur"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "secateur"]
    weights = []
    for name, start in (("one", one), ("two", two)):
        out = tmp_path / name
        command = [*start, "prune", *common, *plain, "--method", "sparsegpt", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(out / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor == 0, weights[1][name] == 0), name
