"""A narrower model in the stock class: exact against a silenced one, resumable, refused in time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from elsewhere import IDS, loaded_elsewhere
from safetensors.torch import load_file
from small_runs import interrupted, same_bytes
from tiny_models import save_dead, save_tiny, undo_mean
from transformers import AutoModelForCausalLM

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.core.errors import AnatomyError, RecipeError

prune = partial(small_runs.prune, method="minitron", sparsity=0.25)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_heads_and_channels_that_go_are_silenced_ones(family: str, tmp_path: Path) -> None:
    model, out = save_tiny(family, tmp_path / "model"), tmp_path / "out"
    prune(model, out, options={"width": "heads,ffn"})
    scores = load_file(out / "scores.safetensors")
    pruned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    heads, channels = pruned.config.num_attention_heads, pruned.config.intermediate_size
    assert heads < dense.config.num_attention_heads
    for block in resolve(dense.config).blocks:
        parameters = dict(dense.get_submodule(block.prefix).state_dict())
        units = {found.kind: found for found in units_of(block)}
        ffn = scores[f"{block.index}.ffn"].argsort(descending=True)[channels:]
        groups = units["kv_groups"].count
        each = scores[f"{block.index}.heads"].double().view(groups, -1, pruned.config.head_dim).norm(dim=-1)
        for group, importance in enumerate(each):
            gone = importance.argsort(descending=True)[heads // groups :] + group * each.shape[1]
            columns = (
                units["kv_groups"].writer.view(parameters).view(-1, each.numel(), pruned.config.head_dim)
            )
            columns[:, gone] = 0
        units["ffn"].writer.view(parameters)[:, ffn] = 0
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_dead_hidden_dimensions_go_first_and_only_the_mean_of_the_norms_notices(tmp_path: Path) -> None:
    """Norms divide by the dimensions that are left: with that made up for, nothing has changed."""
    model, dead = tmp_path / "model", torch.arange(3, 59, 7)
    dense = save_dead(model, dead, tie_word_embeddings=True)
    share = len(dead) / dense.config.hidden_size
    prune(model, tmp_path / "out", options={"width": "hidden"}, sparsity=share)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert pruned.config.hidden_size == dense.config.hidden_size - len(dead)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    undo_mean(pruned, dense.config.hidden_size)
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "olmo2", "gpt_neox"])
def test_what_stands_outside_the_blocks_shrinks_along(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    report = prune(model, tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.num_parameters() == report.parameters_after < report.parameters_before
    assert torch.isfinite(pruned(IDS).logits).all()
    assert "secateur" not in (tmp_path / "out" / "config.json").read_text()


def test_it_loads_where_secateur_is_not(tmp_path: Path) -> None:
    model, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    prune(model, out)
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(loaded_elsewhere(out).logits, here(IDS).logits)


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    prune(model, tmp_path / "whole")
    with interrupted(after=2):
        prune(model, tmp_path / "out")
    prune(model, tmp_path / "out", resume=True)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors")


def test_a_search_takes_the_widths_under_which_the_text_is_likeliest(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    report = prune(model, tmp_path / "out", options={"search": 3, "round_ffn": 4})
    assert report.sparsity >= 0.25
    [line] = [warning for warning in report.warnings if "Perplexity" in warning]
    tried = [part.rsplit(": ", 1) for part in line.removesuffix(".").split(": ", 1)[1].split("; ")]
    assert len(tried) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    best = min(tried, key=lambda pair: float(pair[1]))[0]
    assert f"hidden {config['hidden_size']}" in best
    assert f"ffn {config['intermediate_size']}" in best


def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="legal widths"):
        prune(model, tmp_path / "out", options={"width": "heads"}, sparsity=0.02)
    with pytest.raises(AnatomyError, match="experts"):
        prune(save_tiny("mixtral", tmp_path / "experts"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
