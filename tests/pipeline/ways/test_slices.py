"""Sliced models on files: free where the stream is thin, loadable, resumable, and open to what comes next."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from elsewhere import IDS, How, loaded_elsewhere
from small_runs import interrupted, same_bytes
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.core.errors import AnatomyError, RecipeError

prune = partial(small_runs.prune, method="slicegpt", sparsity=0.25)


@pytest.mark.parametrize(("slice_head", "orientation"), [(False, "random"), (True, "pca")])
def test_a_stream_that_fills_half_of_its_directions_is_sliced_for_nothing(
    slice_head: bool, orientation: str, tmp_path: Path
) -> None:
    model = save_tiny("qwen2", tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    directions = torch.linalg.qr(torch.randn(64, 28, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight @ directions @ directions.T)
        for block in dense.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight.copy_(directions @ directions.T @ writer.weight)
    dense.save_pretrained(model)
    options = {"round_to": 4, "slice_head": slice_head, "orientation": orientation}
    report = prune(model, tmp_path / "out", options=options)
    assert all(row.notes["lost_after_attention"] < 1e-10 for row in report.layers)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert pruned.model.embed_tokens.weight.shape[1] < 64
    assert pruned.lm_head.weight.shape[1] == (pruned.model.embed_tokens.weight.shape[1] if slice_head else 64)
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    assert report.kl_divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("how", ["import", "remote"])
def test_it_loads_generates_and_learns_in_a_fresh_process(how: How, tmp_path: Path) -> None:
    model, out = save_tiny("qwen3", tmp_path / "model"), tmp_path / "out"
    report = prune(model, out, options={"round_to": 1})
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert report.parameters_after == sum(p.numel() for p in here.parameters())
    assert here.lm_head.weight is not here.model.embed_tokens.weight
    assert torch.equal(loaded_elsewhere(out, how).logits, here(IDS).logits)


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    settings = {"options": {"round_to": 1}}
    prune(model, tmp_path / "whole", **settings)
    for resume in (False, True):
        with interrupted(after=1):
            prune(model, tmp_path / "out", resume=resume, **settings)
    prune(model, tmp_path / "out", resume=True, **settings)
    assert same_bytes(tmp_path / "out", tmp_path / "whole")


def test_a_sliced_model_is_inspected_and_pruned_on_and_never_shuffled(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    once = tmp_path / "once"
    prune(model, once, options={"round_to": 1})
    assert secateur.inspect(once)["blocks"] == 3
    zeros = prune(once, tmp_path / "zeros", method="wanda", sparsity=0.5)
    assert zeros.parameters_after == zeros.parameters_before
    assert not any("shortcut" in row.matrix for row in zeros.layers)
    fewer = prune(once, tmp_path / "fewer", method="flap", sparsity=0.2)
    assert fewer.parameters_after < fewer.parameters_before
    AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    for method in ("shortgpt", "slicegpt", "minitron"):
        with pytest.raises(AnatomyError):
            prune(once, tmp_path / "out", method=method, sparsity=0.34)
    assert not (tmp_path / "out").exists()


def test_blocks_that_differ_already_are_sliced_too(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "cut", method="flap", sparsity=0.2)
    report = prune(tmp_path / "cut", tmp_path / "out", options={"round_to": 1})
    assert report.parameters_after < report.parameters_before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(IDS).logits).all()


def test_shares_that_shortcuts_eat_up_are_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="shortcut matrices"):
        prune(model, tmp_path / "out", sparsity=0.01)
    with pytest.raises(AnatomyError, match="residual stream"):
        prune(save_tiny("gemma2", tmp_path / "gemma"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
