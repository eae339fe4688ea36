"""Sliced models on files: free where the stream is thin, loadable, resumable, and open to what comes next."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS, How, loaded_elsewhere
from small_runs import interrupted, same_bytes
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.anatomy.stream import stream_of
from secateur.core.errors import AnatomyError, RecipeError

prune = partial(small_runs.prune, method="slicegpt", sparsity=0.25)


@pytest.mark.parametrize(("slice_head", "orientation"), [(False, "random"), (True, "pca")])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gpt_neox"])
def test_a_stream_that_fills_half_of_its_directions_is_sliced_for_nothing(
    family: str, slice_head: bool, orientation: str, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    directions = torch.linalg.qr(torch.randn(64, 28, generator=torch.Generator().manual_seed(0)))[0]
    stream = stream_of(dense.config, anatomy := resolve(dense.config))
    with torch.no_grad():
        for path in stream.embeddings:
            rows = dense.get_submodule(path).weight
            rows.copy_(rows @ directions @ directions.T)
        for block in anatomy.blocks:
            own = dict(dense.get_submodule(block.prefix).state_dict())
            for writer in stream.writers(block):
                writer.view(own).copy_(directions @ directions.T @ writer.view(own))
                if f"{writer.name}.bias" in own:
                    own[f"{writer.name}.bias"].copy_(directions @ directions.T @ own[f"{writer.name}.bias"])
    dense.save_pretrained(model)
    options = {"round_to": 4, "slice_head": slice_head, "orientation": orientation}
    report = prune(model, tmp_path / "out", options=options)
    assert all(lost < 1e-10 for row in report.layers for lost in row.notes.values())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    widths = {pruned.get_submodule(path).weight.shape[1] for path in stream.embeddings}
    assert len(widths) == 1
    assert max(widths) < 64
    assert pruned.get_output_embeddings().weight.shape[1] == (max(widths) if slice_head else 64)
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    assert report.kl_divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "how", "options"),
    [
        ("qwen3", "import", {}),
        ("qwen3", "remote", {}),
        ("gpt2", "remote", {}),
        ("gpt2", "remote", {"slice_head": True}),
        ("opt", "remote", {}),
        ("gpt_neox", "remote", {"slice_head": True}),
    ],
)
def test_it_loads_generates_and_learns_in_a_fresh_process(
    family: str, how: How, options: dict[str, Any], tmp_path: Path
) -> None:
    model, out = save_tiny(family, tmp_path / "model"), tmp_path / "out"
    report = prune(model, out, options={"round_to": 1, **options})
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert report.parameters_after == sum(p.numel() for p in here.parameters())
    assert here.get_output_embeddings().weight is not here.get_input_embeddings().weight
    assert torch.equal(loaded_elsewhere(out, how).logits, here(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_interrupted_run_ends_in_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    settings = {"options": {"round_to": 1}}
    prune(model, tmp_path / "whole", **settings)
    for resume in (False, True):
        with interrupted(after=1):
            prune(model, tmp_path / "out", resume=resume, **settings)
    prune(model, tmp_path / "out", resume=True, **settings)
    assert same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("family", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_sliced_model_is_inspected_and_pruned_on_and_never_shuffled(
    family: str, layers: str, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model", **{layers: 3})
    once = tmp_path / "once"
    prune(model, once, options={"round_to": 1})
    assert secateur.inspect(once)["blocks"] == 3
    zeros = prune(once, tmp_path / "zeros", method="wanda", sparsity=0.5)
    assert zeros.parameters_after == zeros.parameters_before
    assert not any("shortcut" in row.matrix for row in zeros.layers)
    targets = {"targets": "ffn"} if family == "gpt2" else {}
    fewer = prune(once, tmp_path / "fewer", method="flap", sparsity=0.2, options=targets)
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
