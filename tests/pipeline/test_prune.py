"""Whole runs: folders and models in memory agree, budgets are exact, what is odd is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from safetensors.torch import load_file, save_file
from small_runs import text_beside
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.calibration.windows import Windows
from secateur.cli.app import run
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern
from secateur.pipeline import data

CONTRACT = {
    "method",
    "sparsity_requested",
    "sparsity",
    "parameters_before",
    "parameters_after",
    "bytes_before",
    "bytes_after",
    "perplexity_before",
    "perplexity_after",
    "kl_divergence",
    "top1_agreement",
    "prefill_tokens_per_second_before",
    "prefill_tokens_per_second_after",
    "decode_tokens_per_second_before",
    "decode_tokens_per_second_after",
    "peak_memory_bytes",
    "seconds",
    "protocol",
    "seed",
    "versions",
    "layers",
}
CALIBRATION = {"samples": 6, "length": 24, "batch_size": 2}
prune = partial(small_runs.prune, method="wanda", sparsity=0.5, calibration=CALIBRATION, evaluation_windows=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("prune") / "model", num_hidden_layers=3)


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Every prunable matrix of a folder, (out, in)."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        f"{block.index}.{matrix.name}": matrix.view(loaded.get_submodule(block.prefix).state_dict())
        for block in resolve(loaded.config).blocks
        for matrix in block.matrices
    }


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm", "random"])
def test_memory_and_folder_agree(method: str, model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "out", method=method)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    calibration = {"source": text_beside(model), **CALIBRATION}
    secateur.prune(
        loaded, tokenizer=tiny_tokenizer(), method=method, sparsity=0.5, calibration=calibration,
        evaluation_windows=0,
    )  # fmt: skip
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, on_disk[name]), name


def test_global_removes_the_exact_count_and_differs_between_matrices(model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out", method="wanda", pattern="global", sparsity=0.55)
    found = matrices(tmp_path / "out")
    total = sum(matrix.numel() for matrix in found.values())
    assert sum(int((matrix == 0).sum()) for matrix in found.values()) == int(0.55 * total + 1e-6)
    assert len({round(row.sparsity, 3) for row in report.layers}) > 3


def test_global_magnitude_is_one_threshold(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "out", method="magnitude", pattern="global")
    before, after = matrices(model), matrices(tmp_path / "out")
    kept = torch.cat([matrix[matrix != 0].abs() for matrix in after.values()])
    gone = torch.cat([before[name][after[name] == 0].abs() for name in after])
    assert gone.max() <= kept.min()


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_allocations_spend_the_whole_budget(allocation: str, model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out", allocation=allocation, sparsity=0.6, pattern="matrix")
    by_block = {row.block: row.sparsity_requested for row in report.layers}
    assert len(set(by_block.values())) > 1
    assert sum(by_block.values()) / len(by_block) == pytest.approx(0.6)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)


def test_ria_permutation_is_folded_into_the_file(model: Path, tmp_path: Path) -> None:
    options = {"permutation": "hungarian"}
    report = prune(model, tmp_path / "out", method="ria", pattern="2:4", sparsity=None, options=options)
    for name, matrix in matrices(tmp_path / "out").items():
        assert check_pattern(matrix, Pattern.parse("2:4")) == 0, name
    silent = {row.matrix for row in report.layers if not row.fallbacks}
    assert silent == {"mlp.down_proj", "self_attn.o_proj"}, "only what the block makes for itself"


def test_inputs_that_are_always_zero_are_reported(model: Path, tmp_path: Path) -> None:
    dead = Path(save_tiny("llama", tmp_path / "dead"))
    tensors = load_file(dead / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].zero_()
    save_file(tensors, dead / "model.safetensors", metadata={"format": "pt"})
    for method in ("wanda", "sparsegpt"):
        report = prune(dead, tmp_path / method, method=method)
        said = {row.matrix for row in report.layers if row.block == 0 and row.fallbacks}
        assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} <= said
        assert all(row.sparsity == pytest.approx(0.5) for row in report.layers)


def test_report_keeps_the_contract(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(model), "-o", str(out), "--method", "wanda", "--sparsity", "0.5", "--json"]
    data = [
        "--calibration",
        text_beside(model),
        "--samples",
        "4",
        "--length",
        "24",
        "--evaluation-windows",
        "3",
    ]
    assert run([*arguments, *data]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((out / "report.json").read_text())
    assert printed == stored
    assert stored.keys() >= CONTRACT
    assert stored["perplexity_after"] > 0
    assert 0 <= stored["top1_agreement"] <= 1
    assert stored["decode_tokens_per_second_after"] > 0
    assert stored["protocol"]["window"] == stored["protocol"]["stride"] == 24
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert "Unstructured zeros" in stored["effect"]


def test_recipe_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: sparsegpt\npattern: '2:4'\noptions: {{blocksize: 32}}\n"
        f"calibration: {{source: {text_beside(model)}, samples: 4, length: 24}}\n"
        "evaluation_windows: 0\nmeasure_speed: false\n"
    )
    assert run(["prune", "-o", str(tmp_path / "out"), "--recipe", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["pattern"], report["options"]["blocksize"]) == ("sparsegpt", "2:4", 32)
    assert report["not_measured"]["perplexity_after"]


def test_a_model_samples_its_text_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Windows] = []
    load = data.load_windows

    def counted(*args: Any, **given: Any) -> Windows:
        made.append(load(*args, **given))
        return made[-1]

    monkeypatch.setattr(data, "load_windows", counted)
    own = {**CALIBRATION, "source": "self"}
    model, other = save_tiny("llama", tmp_path / "model"), save_tiny("llama", tmp_path / "other", seed=1)
    first = prune(model, tmp_path / "one", calibration=own)
    again = prune(model, tmp_path / "two", calibration=own)
    assert len(made) == 1
    assert again.calibration == first.calibration
    prune(model, tmp_path / "three", calibration=own, seed=1)
    prune(other, tmp_path / "four", calibration=own)
    assert len({windows.sha256 for windows in made}) == 3
