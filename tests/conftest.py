"""What several rooms of the tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from secateur.evaluation import reopen

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """Texts and trained models that are not part of the project; tests that need them are skipped without."""
    folder = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no trained models in {folder} (set SECATEUR_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def nothing_is_reopened() -> Iterator[Callable[..., str]]:
    """Many tests prune: none starts a second process to look at its result, but those marked `reopens`."""
    real = reopen.reopen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reopen, "reopen", lambda *_, **__: "yes: as told by the tests")
        yield real


@pytest.fixture(autouse=True)
def reopened_where_marked(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    nothing_is_reopened: Callable[..., str],
) -> None:
    if "reopens" in request.keywords:
        monkeypatch.setattr(reopen, "reopen", nothing_is_reopened)
