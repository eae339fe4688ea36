"""What a plan promises is what the run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

import secateur
from secateur.core.method import methods_of

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 100
OPTIONS: dict[str, dict[str, Any]] = {"slicegpt": {"round_to": 1}, "tyr": {"generations": 1}}
FOUND = {"adapt-pruner", "blockpruner", "cfsp", "flap"}
"""What goes where, and so how many heads and how many channels, is what these find."""
CASES = [
    *((method, OPTIONS.get(method, {})) for method in methods_of("structure")),
    ("flap", {"spread": "uniform"}),
    ("llm-pruner", {"mode": "channel"}),
    ("llm-pruner", {"mode": "layer"}),
    ("llm-pruner", {"steps": 2}),
    ("minitron", {"search": 2}),
    ("slicegpt", {"round_to": 1, "slice_head": True}),
]


def both(model: Path, method: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    path = model.parent / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    settings: dict[str, Any] = {
        "method": method,
        "sparsity": 0.25,
        "options": options,
        "calibration": {"source": str(path), "samples": 4, "length": 24},
        "evaluation_windows": 0,
        "measure_speed": False,
        "check_loading": False,
    }
    return secateur.plan(model, **settings), secateur.prune(model, model.parent / "out", **settings)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda value: str(value))
def test_every_method_writes_what_was_planned(
    method: str, options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=tied)
    planned, report = both(model, method, options)
    found = (method in FOUND and not options.get("spread")) or "search" in options
    assert planned["exact"] == (not found)
    if planned["exact"]:
        assert planned["parameters_after"] == report.parameters_after
        assert planned["bytes_after"] == report.bytes_after
        assert planned["sparsity"] == pytest.approx(report.sparsity, abs=0.01)
    else:
        assert planned["parameters_after"] == pytest.approx(report.parameters_after, rel=0.06)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in written.values()) == report.bytes_after


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("slicegpt", {"round_to": 1}),
        ("slicegpt", {"round_to": 1, "slice_head": True}),
        ("minitron", {}),
        ("flap", {"spread": "uniform"}),
    ],
    ids=["slices", "with-head", "width", "heads"],
)
def test_positions_and_biases_are_counted_too(
    family: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    planned, report = both(save_tiny(family, tmp_path / "model"), method, options)
    assert planned["parameters_after"] == report.parameters_after
    assert planned["bytes_after"] == report.bytes_after


@pytest.mark.parametrize(("method", "options"), [("slicegpt", {"round_to": 1}), ("minitron", {})])
def test_files_of_two_dtypes_with_tensors_of_no_parameter(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Embeddings in float32 beside blocks in bfloat16, a table that no module has, and a tied head stored."""
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    path = model / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"].float()
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = embedding.clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, {"format": "pt"})
    planned, report = both(model, method, options)
    assert planned["parameters_after"] == report.parameters_after
    assert planned["bytes_after"] == report.bytes_after
