"""Every method that removes experts, on families that differ: shared experts, biases, stored transposed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import prune, require_smaller
from tiny_models import save_tiny

from secateur.core.method import methods_of

FAMILIES = {"mixtral": torch.float32, "qwen2_moe": torch.float16, "gpt_oss": torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", methods_of("experts"))
def test_what_comes_out_is_smaller_loads_and_is_what_was_measured(
    method: str, family: str, tmp_path: Path
) -> None:
    dtype = FAMILIES[family]
    model = save_tiny(family, tmp_path / "model", dtype=dtype)
    report = prune(model, tmp_path / "out", method=method, sparsity=0.25)
    require_smaller(report, model, tmp_path / "out", dtype)
    assert report.method == method
    assert report.pattern == "experts"
