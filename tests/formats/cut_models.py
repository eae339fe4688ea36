"""Tiny models whose blocks differ, made by a pruning run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import save_tiny

import secateur

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 100


def save_cut(family: str, folder: Path, compensate: str = "none", **options: Any) -> Path:
    """A checkpoint in which every block has sizes of its own (`spread=global`), or as the options say."""
    model = save_tiny(family, folder / f"{family}-dense", num_hidden_layers=3)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / f"{family}-{compensate}-{'-'.join(map(str, options.values()))}"
    secateur.prune(
        model, out, method="flap", sparsity=0.3,
        options={"compensate": compensate, "spread": "global", **options},
        calibration={"source": str(folder / "text.txt"), "samples": 4, "length": 24},
        evaluation_windows=0, measure_speed=False, check_loading=False,
    )  # fmt: skip
    return out
