"""What blocks do to the hidden state, and the spread that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from small_runs import TEXT
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.core.errors import InputError

SAMPLES, LENGTH = 3, 16


def prune(model: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    small_runs.prune(
        model, out, method="cfsp", sparsity=0.2, options=options, evaluation_windows=0,
        calibration={"samples": SAMPLES, "length": LENGTH},
    )  # fmt: skip
    return load_file(out / "scores.safetensors")


def seen(model: Path, part: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters and what leaves every block or feed-forward part, from hooks on the stock model."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(TEXT, add_special_tokens=False)["input_ids"]
    entered, found = {}, []
    for block in dense.model.layers:
        first = block if part == "block" else block.post_attention_layernorm
        if part == "block" or dense.config.model_type == "llama":
            first.register_forward_pre_hook(lambda _, a, block=block: entered.update({block: a[0]}))
        else:  # gemma2: the residual stream enters the norm before the feed-forward part
            norm = block.pre_feedforward_layernorm
            norm.register_forward_pre_hook(lambda _, a, block=block: entered.update({block: a[0]}))
        block.register_forward_hook(
            lambda block, _, out: found.append((entered[block], out if torch.is_tensor(out) else out[0]))
        )
    with torch.no_grad():
        dense(torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH))
    return found


def expected(coarse: str, before: torch.Tensor, after: torch.Tensor) -> float:
    cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    change = (after - before).double()
    values = {
        "angular": cosine.arccos() / torch.pi,
        "cosine": 1 - cosine,
        "mse": change.square().mean(-1),
        "mae": change.abs().mean(-1),
    }
    return float(values[coarse].mean())


@pytest.mark.parametrize("scope", ["block", "mlp"])
@pytest.mark.parametrize(
    ("coarse", "name"), [("angular", "turns"), ("cosine", "influence"), ("mse", "mse"), ("mae", "mae")]
)
def test_changes_are_those_of_the_stock_model(scope: str, coarse: str, name: str, tmp_path: Path) -> None:
    family = "gemma2" if coarse == "angular" else "llama"  # gemma2 has a norm behind the feed-forward part
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3)
    scores = prune(model, tmp_path / "out", coarse=coarse, coarse_scope=scope)
    found = scores[name if scope == "block" else f"{name}.mlp"]
    assert found.tolist() == pytest.approx([expected(coarse, *pair) for pair in seen(model, scope)], rel=1e-4)


def test_looking_across_the_feed_forward_part_leaves_the_model_alone(tmp_path: Path) -> None:
    """Scores, which are observed block after block, are those of a run that looks across blocks."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    block, part = (prune(model, tmp_path / scope, coarse_scope=scope) for scope in ("block", "mlp"))
    assert all(torch.equal(block[name], part[name]) for name in block if name.endswith("ffn"))


def test_scores_seen_otherwise_are_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "first")
    with pytest.raises(InputError, match=r"no turns\.mlp"):
        secateur.prune(
            model,
            tmp_path / "out",
            method="cfsp",
            sparsity=0.2,
            options={"coarse_scope": "mlp"},
            scores=str(tmp_path / "first" / "scores.safetensors"),
            evaluation_windows=0,
        )
