"""Every structured method of the catalogue, on families that differ in what belongs together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import prune, require_smaller
from tiny_models import save_tiny

from secateur.core.method import methods_of

OPTIONS = {
    "slicegpt": {"round_to": 1},  # tiny models have few multiples of 8
    "adapt-pruner": {"step": 0.05},
    "tyr": {"generations": 2, "offspring": 6, "tokens": [48, 144], "survivors": [2]},
}
FAMILIES = {"llama": torch.float32, "qwen2": torch.bfloat16, "phi3": torch.float16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", methods_of("structure"))
def test_what_comes_out_is_smaller_loads_and_is_what_was_measured(
    method: str, family: str, tmp_path: Path
) -> None:
    dtype = FAMILIES[family]
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=4, dtype=dtype)
    report = prune(model, tmp_path / "out", method=method, sparsity=0.25, options=OPTIONS.get(method, {}))
    require_smaller(report, model, tmp_path / "out", dtype)
    assert report.method == method
    assert report.pattern == "structure"
