"""Structured runs on files: exact against a masked model, loadable, resumable, honest."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS, How, loaded_elsewhere
from safetensors.torch import load_file
from small_runs import interrupted, same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.cli.app import run
from secateur.core.errors import InputError, RecipeError
from secateur.structure.allocation import Scored, allocate
from secateur.structure.wanda_structure import WandaStructure

CUTTABLE = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite"),
    *("gpt2", "opt", "gpt_neox"),
]
prune = partial(small_runs.prune, sparsity=0.3)


def silenced(model: Path, out: Path, sparsity: float) -> Any:
    """The dense model in which what a run has removed writes nothing."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    blocks = resolve(dense.config).blocks
    scores = load_file(out / "scores.safetensors")
    groups = [
        Scored(block.index, units, scores[f"{block.index}.{units.kind}"])
        for block in blocks
        for units in units_of(block)
    ]
    kept = allocate(groups, [block.size for block in blocks], sparsity, WandaStructure())
    with torch.no_grad():
        for group, stays in zip(groups, kept, strict=True):
            block = blocks[group.block]
            view = group.units.writer.view(dict(dense.get_submodule(block.prefix).state_dict()))
            gone = sorted(set(range(group.units.count)) - set(stays.tolist()))
            view[:, group.units.columns(torch.tensor(gone, dtype=torch.long))] = 0
    return dense


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_cut_model_is_the_silenced_one_and_loads(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    out = tmp_path / "out"
    report = prune(model, out, method="wanda-structure")
    expected = silenced(model, out, 0.3)(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert report.parameters_after == sum(p.numel() for p in loaded.parameters())
    assert report.bytes_after < report.bytes_before
    assert report.sparsity == pytest.approx(0.3, abs=0.02)


def test_uniform_sizes_are_the_stock_class_and_no_code(tmp_path: Path) -> None:
    model = save_tiny("qwen3", tmp_path / "model")
    prune(model, tmp_path / "out", method="magnitude-structure")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert not list((tmp_path / "out").glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(("family", "stock"), [("llama", True), ("granite", True), ("qwen2", False)])
def test_added_biases_are_those_of_the_stock_class_where_it_has_them(
    family: str, stock: bool, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    out = tmp_path / "out"
    prune(model, out, method="flap", options={"spread": "uniform"})
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"] == family) == stock
    assert bool(list(out.glob("*.py"))) != stock
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    attention, mlp = here.model.layers[1].self_attn, here.model.layers[1].mlp
    assert float(attention.o_proj.bias.detach().abs().sum()) > 0
    assert float(mlp.down_proj.bias.detach().abs().sum()) > 0
    if stock:
        assert config["attention_bias"]
        assert config["mlp_bias"]
        for zero in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            assert not zero.bias.detach().any()
    prune(model, tmp_path / "none", method="flap", options={"spread": "uniform", "compensate": "none"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "none", dtype=torch.float32).eval()
    for block, other in zip(plain.model.layers, here.model.layers, strict=True):
        for owner, source in ((block.self_attn, other.self_attn), (block.mlp, other.mlp)):
            name = "o_proj" if hasattr(owner, "o_proj") else "down_proj"
            getattr(owner, name).bias = getattr(source, name).bias
    torch.testing.assert_close(plain(IDS).logits, here(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["import", "remote"])
def test_blocks_of_different_sizes_load_in_a_fresh_process(how: How, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    out = tmp_path / "out"
    report = prune(model, out, method="flap")
    assert any("import secateur" in warning for warning in report.warnings)
    config = json.loads((out / "config.json").read_text())
    assert len({json.dumps(own) for own in config["per_layer_config"].values()}) > 1
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    biases = [p for name, p in here.named_parameters() if name.endswith("_proj.bias")]
    assert biases
    assert any(float(bias.detach().abs().sum()) > 0 for bias in biases)
    assert torch.equal(loaded_elsewhere(out, how).logits, here(IDS).logits)


def test_a_cut_model_is_opened_evaluated_and_cut_again(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "once", method="flap", sparsity=0.2)
    assert secateur.inspect(tmp_path / "once")["blocks"] == 3
    again = prune(tmp_path / "once", tmp_path / "twice", method="wanda-structure", sparsity=0.2)
    assert again.parameters_after < again.parameters_before
    zeros = prune(tmp_path / "once", tmp_path / "zeros", method="wanda", sparsity=0.5)
    assert zeros.parameters_after == zeros.parameters_before
    AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    AutoModelForCausalLM.from_pretrained(tmp_path / "zeros")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wanda-structure", {"compensate": "bias"}),
        ("wanda-structure", {"compensate": "least_squares"}),
        ("osscar", {"swaps": 8}),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    settings = {"method": method, "options": options}
    prune(model, tmp_path / "whole", **settings)
    with interrupted(after=2):
        prune(model, tmp_path / "out", **settings)
    prune(model, tmp_path / "out", resume=True, **settings)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors")


def test_least_squares_beats_silence_in_every_block(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    report = prune(model, tmp_path / "out", method="osscar")
    assert all(block.loss is not None and 0 < block.loss < 1 for block in report.blocks)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_swaps_change_what_stays_and_never_lose_more_in_the_first_block(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    plain = prune(model, tmp_path / "plain", method="osscar", options={"rounds": 2})
    scores = str(tmp_path / "plain" / "scores.safetensors")
    options = {"rounds": 2, "swaps": 16}
    swapped = prune(model, tmp_path / "swapped", method="osscar", options=options, scores=scores)
    assert swapped.parameters_after == plain.parameters_after
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "swapped")]
    assert files[0].read_bytes() != files[1].read_bytes()
    with pytest.raises(RecipeError, match="least_squares"):
        prune(model, tmp_path / "out", method="osscar", options={"swaps": 4, "compensate": "none"})


def test_bad_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="leave --pattern out"):
        prune(model, tmp_path / "out", method="flap", pattern="2:4", sparsity=0.5)
    with pytest.raises(RecipeError, match="at most"):
        prune(model, tmp_path / "out", method="flap", sparsity=0.99)
    command = ["prune", str(model), "-o", str(tmp_path / "out"), "--method", "flap", "--sparsity", "0.99"]
    code = run([*command, "--calibration", text_beside(model), "--length", "24", "--samples", "4"])
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plan_tells_bytes_and_speed(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    facts = secateur.plan(model, method="flap", sparsity=0.3)
    assert facts["faster"]
    assert facts["bytes_after"] < facts["bytes_before"]


def test_saved_scores_plan_other_ratios_of_the_same_model_only(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "first", method="flap", sparsity=0.2)
    scores = str(tmp_path / "first" / "scores.safetensors")
    prune(model, tmp_path / "again", method="flap", sparsity=0.4, scores=scores)
    prune(model, tmp_path / "fresh", method="flap", sparsity=0.4)
    assert same_bytes(tmp_path / "again", tmp_path / "fresh", "scores.safetensors")
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=3, seed=1)
    with pytest.raises(InputError, match="scores of model"):
        prune(other, tmp_path / "out", method="flap", scores=scores)
    with pytest.raises(InputError, match="scores of method"):
        prune(model, tmp_path / "out", method="wanda-structure", scores=scores)
    with pytest.raises(InputError, match="no turns"):
        prune(model, tmp_path / "out", method="flap", options={"spread": "sigmoid"}, scores=scores)
    with pytest.raises(RecipeError, match="leave --scores out"):
        prune(model, tmp_path / "out", method="wanda", scores=scores)
