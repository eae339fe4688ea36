"""What tests of whole runs share: a text, quick runs, runs that are interrupted, files that are equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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
