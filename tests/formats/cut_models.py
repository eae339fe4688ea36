"""Tiny models whose blocks differ, made by a pruning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import prune
from tiny_models import save_tiny


def save_cut(family: str, folder: Path, compensate: str = "none", **options: Any) -> Path:
    """A checkpoint in which every block has sizes of its own (`spread=global`), or as the options say."""
    model = save_tiny(family, folder / f"{family}-dense", num_hidden_layers=3)
    out = folder / f"{family}-{compensate}-{'-'.join(map(str, options.values()))}"
    prune(
        model, out, method="flap", sparsity=0.3,
        options={"compensate": compensate, "spread": "global", **options},
        calibration={"samples": 4}, evaluation_windows=0, check_loading=False,
    )  # fmt: skip
    return out
