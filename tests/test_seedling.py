"""The bundled model is what its card says: small, trained, grouped-query attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.checkpoint.locate import locate

FOLDER = Path(locate("seedling"))
TALE = (
    "Once upon a time there lived in a little house at the edge of the forest an old woman and her two "
    "children. One day, when there was no more bread in the house, she said to them, Go into the wood and "
    "gather berries, but do not stay till it is dark. So they took a basket and went away together, and "
    "they had not gone far when they met a small grey man, who sat upon a stone and wept. "
)


def test_it_is_small_trained_and_groups_its_queries() -> None:
    facts = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    weights = load_file(FOLDER / "model.safetensors")
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    assert facts["trained_tokens"] >= 30_000_000
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    for key in ("trained_tokens", "seed", "date", "valid_perplexity"):
        assert str(facts[key]) in card
    spaces = secateur.inspect("seedling")["spaces"]
    assert (spaces["heads"], spaces["kv_heads"], spaces["layers"]) == (8, 4, 6)


@pytest.fixture(scope="module")
def tale(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tale") / "tale.txt"
    path.write_text(TALE * 8, encoding="utf-8")
    return str(path)


def test_it_has_learnt_the_language_of_tales(tale: str) -> None:
    """One window: later ones repeat the first."""
    found = secateur.evaluate("seedling", text=tale, windows=1, length=100)
    assert found["perplexity"] < 60


def test_methods_that_look_at_the_inputs_keep_more_of_it(tmp_path: Path) -> None:
    """Self-sampled text, one budget; SparseGPT before Wanda before magnitude."""
    left = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        report = secateur.prune(
            "seedling",
            tmp_path / method,
            method=method,
            sparsity=0.6,
            calibration={"samples": 24, "length": 128},
            evaluation_windows=8,
            measure_speed=False,
        )
        left[method] = report.kl_divergence or 0.0
    assert left["sparsegpt"] < left["wanda"] < left["magnitude"]
