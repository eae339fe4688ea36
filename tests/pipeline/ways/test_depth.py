"""Whole blocks away: the right ones, under new numbers, in the stock class."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from secateur.core.errors import RecipeError

prune = partial(small_runs.prune, method="shortgpt")


def without_blocks(model: Path, gone: set[int]) -> Any:
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stay = [block for index, block in enumerate(dense.model.layers) if index not in gone]
    dense.model.layers = torch.nn.ModuleList(stay)
    for index, block in enumerate(stay):
        block.self_attn.layer_idx = index
    dense.config.num_hidden_layers = len(stay)
    return dense


def silence(model: Path, *indices: int) -> None:
    """Blocks that add nothing to the residual stream."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for index in indices:
            dense.model.layers[index].self_attn.o_proj.weight.zero_()
            dense.model.layers[index].mlp.down_proj.weight.zero_()
    dense.save_pretrained(model)


@pytest.mark.parametrize("metric", ["influence", "angular"])
def test_blocks_that_do_nothing_go_first_and_nothing_changes(metric: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=5)
    silence(model, 2, 3)
    report = prune(model, tmp_path / "out", sparsity=0.4, options={"metric": metric})
    assert [row.block for row in report.layers if row.sparsity] == [2, 3]
    assert report.kl_divergence == pytest.approx(0, abs=1e-6)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert len(pruned.model.layers) == 3
    assert torch.equal(pruned(IDS).logits, without_blocks(model, {2, 3})(IDS).logits)
    assert type(pruned).__name__ == "LlamaForCausalLM"
    assert report.parameters_after == sum(p.numel() for p in pruned.parameters())


def test_lists_with_an_entry_a_block_lose_the_same_entries(tmp_path: Path) -> None:
    model = save_tiny("gemma2", tmp_path / "model", num_hidden_layers=4)
    before = json.loads((model / "config.json").read_text())
    report = prune(model, tmp_path / "out", sparsity=0.25)
    gone = next(row.block for row in report.layers if row.sparsity)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = before["layer_types"]
    assert after["layer_types"] == [kind for index, kind in enumerate(kinds) if index != gone]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_cut_model_keeps_the_sizes_of_the_blocks_that_stay(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    prune(model, tmp_path / "cut", method="flap", sparsity=0.3)
    prune(tmp_path / "cut", tmp_path / "out", sparsity=0.25)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 3


def test_a_share_that_is_no_block_is_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(RecipeError, match=r"0\.250"):
        prune(model, tmp_path / "out", sparsity=0.05)
