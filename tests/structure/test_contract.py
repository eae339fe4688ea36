"""Every structured method of the catalogue, on families that differ in what belongs together."""

from __future__ import annotations

from itertools import cycle, product
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
DERIVED = {"gpt2": torch.float16, "opt": torch.bfloat16, "gpt_neox": torch.float32}
"""Families whose classes derive the width of a head: each method on one of them."""
CASES = [
    *product(methods_of("structure"), FAMILIES.items()),
    *zip(methods_of("structure"), cycle(DERIVED.items()), strict=False),
]


def named(value: str | tuple[str, torch.dtype]) -> str:
    return value if isinstance(value, str) else value[0]


@pytest.mark.parametrize(("method", "kind"), CASES, ids=named)
def test_what_comes_out_is_smaller_loads_and_is_what_was_measured(
    method: str, kind: tuple[str, torch.dtype], tmp_path: Path
) -> None:
    family, dtype = kind
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=4, dtype=dtype)
    report = prune(model, tmp_path / "out", method=method, sparsity=0.25, options=OPTIONS.get(method, {}))
    require_smaller(report, model, tmp_path / "out", dtype)
    assert report.method == method
    assert report.pattern == "structure"
