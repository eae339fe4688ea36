"""A narrower model in the stock class: exact against a silenced one, resumable, refused in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.core.errors import AnatomyError, RecipeError
from secateur.pipeline.state import Run
from secateur.report.model import Report

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 100
IDS = torch.arange(1, 25).view(2, 12)


def prune(model: Path, out: Path, **settings: Any) -> Report:
    path = model.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    calibration = {"source": str(path), "samples": 6, "length": 24}
    settings = {"sparsity": 0.25, "evaluation_windows": 2, "measure_speed": False, **settings}
    return secateur.prune(model, out, method="minitron", calibration=calibration, **settings)


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
    model, dead = save_tiny("llama", tmp_path / "model", tie_word_embeddings=True), torch.arange(3, 59, 7)
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        dense.model.embed_tokens.weight[:, dead] = 0
        for block in dense.model.layers:
            block.self_attn.o_proj.weight[dead] = 0
            block.mlp.down_proj.weight[dead] = 0
    dense.save_pretrained(model)
    share = len(dead) / dense.config.hidden_size
    prune(model, tmp_path / "out", options={"width": "hidden"}, sparsity=share)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert pruned.config.hidden_size == dense.config.hidden_size - len(dead)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    wider = dense.config.hidden_size / pruned.config.hidden_size
    with torch.no_grad():
        for module in pruned.modules():
            if hasattr(module, "variance_epsilon"):
                module.weight.mul_(wider**0.5)
                module.variance_epsilon *= wider
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "olmo2", "gpt_neox"])
def test_what_stands_outside_the_blocks_shrinks_along(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    report = prune(model, tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.num_parameters() == report.parameters_after < report.parameters_before
    assert torch.isfinite(pruned(IDS).logits).all()
    assert "secateur" not in (tmp_path / "out" / "config.json").read_text()


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "secateur" not in sys.modules
torch.save(model(torch.arange(1, 25).view(2, 12)).logits, sys.argv[2])
"""


def test_it_loads_where_secateur_is_not(tmp_path: Path) -> None:
    model, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    prune(model, out)
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    saved = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", LOAD, str(out), str(saved)], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(saved), here(IDS).logits)


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    prune(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        keep, written = Run.keep, []

        def stop(self: Run, index: int, *rest: Any) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(index)
            keep(self, index, *rest)

        patch.setattr(Run, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, tmp_path / "out")
    prune(model, tmp_path / "out", resume=True)
    for name in ("model.safetensors", "config.json", "scores.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
