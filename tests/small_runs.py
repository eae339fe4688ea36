"""What tests of whole runs share: a text, quick runs, runs that are interrupted, files that are equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.pipeline.state import Run
from secateur.report.model import Report

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 100
WEIGHTS = ("model.safetensors", "config.json")


def text_beside(model: Path) -> str:
    """The path of a file with `TEXT` in the folder that holds the folder of a model."""
    path = model.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def prune(model: Path, out: Path, *, calibration: dict[str, Any] | None = None, **settings: Any) -> Report:
    """A run on a few short windows that is judged on two and not timed; settings and `calibration` win."""
    data = {"source": text_beside(model), "samples": 6, "length": 24, **(calibration or {})}
    quick = {"evaluation_windows": 2, "measure_speed": False}
    report: Report = secateur.prune(model, out, calibration=data, **{**quick, **settings})
    return report


@contextmanager
def interrupted(after: int, owner: object = Run, name: str = "keep") -> Iterator[None]:
    """What happens inside is interrupted, as by Ctrl-C, when it calls `owner.name` again after so many calls.

    Without another owner, it is a pruning run after so many blocks that it has kept.
    """
    original, calls = getattr(owner, name), iter(range(after))

    def stop(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def same_bytes(one: Path, other: Path, *names: str) -> bool:
    """Whether two folders hold the same weights and configuration, and the same of other files by name."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (*WEIGHTS, *names))


def require_smaller(report: Report, model: Path, out: Path, dtype: torch.dtype) -> None:
    """A run that took a quarter away: its files load, are as large as it says, and can be judged."""
    assert report.sparsity == pytest.approx(0.25, abs=0.02)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after < report.parameters_before
    assert sum(p.nbytes for p in loaded.parameters()) == report.bytes_after < report.bytes_before
    again = secateur.evaluate(out, against=model, text=text_beside(model), windows=2, length=24)
    assert math.isfinite(again["perplexity"])
    assert math.isfinite(again["kl_divergence"])
    assert torch.isfinite(loaded(torch.arange(1, 9)[None]).logits).all()
