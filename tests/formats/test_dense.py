"""Padded to uniform sizes: a stock class, in a process without secateur, says the very same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import IDS, loaded_elsewhere
from small_runs import interrupted, same_bytes
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.cut import cut_block, cut_shapes, pad_block
from secateur.anatomy.resolve import resolve
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import ExportError, OutputError

from .cut_models import save_cut


@pytest.mark.parametrize(
    ("family", "compensate", "name"),
    [("llama", "bias", "LlamaForCausalLM"), ("qwen3", "none", "Qwen3ForCausalLM")],
)
def test_a_stock_class_in_a_fresh_process_says_the_same(
    family: str, compensate: str, name: str, tmp_path: Path
) -> None:
    model = save_cut(family, tmp_path, compensate)
    facts = secateur.export(model, tmp_path / "dense", format="dense")
    assert facts["parameters"] > facts["parameters_before"]
    assert not list((tmp_path / "dense").glob("*.py"))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"auto_map", "per_layer_config", "block_biases", "base_model_type"} & config.keys()
    there = loaded_elsewhere(tmp_path / "dense")
    assert there.name == name
    here = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.testing.assert_close(there.logits, here(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"])
def test_other_families_are_padded_too(family: str, tmp_path: Path) -> None:
    model = save_cut(family, tmp_path)
    secateur.export(model, tmp_path / "dense", format="dense")
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (model, tmp_path / "dense")
    ]
    uneven, dense = (each.eval()(IDS).logits for each in models)
    torch.testing.assert_close(dense, uneven, rtol=1e-4, atol=1e-5)


def test_padding_puts_zeros_behind_what_is_there(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("phi3", tmp_path / "model"))
    block = resolve(model.config).blocks[0]
    whole = {name: tensor.detach() for name, tensor in model.get_submodule(block.prefix).state_dict().items()}
    kept = {"ffn": torch.arange(10)}
    smaller = cut_block(block, whole, kept)
    small = type(block)(**{**vars(block), "parameters": cut_shapes(block, {"ffn": 10})})
    small = type(block)(**{**vars(small), "axes": _axes(small, smaller)})
    padded = pad_block(small, smaller, block, torch.float32)
    gate_up, ffn = (
        whole["mlp.gate_up_proj.weight"],
        block.axes["mlp.gate_up_proj.weight"][0].segments[0].count,
    )
    assert torch.equal(padded["mlp.gate_up_proj.weight"][:10], gate_up[:10])
    assert torch.equal(padded["mlp.gate_up_proj.weight"][ffn : ffn + 10], gate_up[ffn : ffn + 10])
    assert not padded["mlp.gate_up_proj.weight"][10:ffn].any()
    assert not padded["mlp.down_proj.weight"][:, 10:].any()
    assert torch.equal(padded["input_layernorm.weight"], whole["input_layernorm.weight"])


def _axes(block: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The axes of a block whose `ffn` has become 10."""

    def shrunk(axis: Any) -> Any:
        segments = [
            type(segment)(segment.space, 10 if segment.space == "ffn" else segment.count, segment.unit)
            for segment in axis.segments
        ]
        return type(axis)(tuple(segments))

    return {name: tuple(map(shrunk, axes)) for name, axes in block.axes.items() if name in tensors}


def test_what_needs_no_padding_or_has_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="uniform already"):
        secateur.export("seedling", tmp_path / "dense", format="dense")
    model = save_cut("mistral", tmp_path, compensate="bias")
    with pytest.raises(ExportError, match=r"proj\.bias, which the stock class of 'mistral' does not have"):
        secateur.export(model, tmp_path / "dense", format="dense")
    assert not (tmp_path / "dense").exists()


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    model = save_cut("llama", tmp_path)
    secateur.export(model, tmp_path / "whole", format="dense")
    with interrupted(2, CheckpointWriter, "write"):
        secateur.export(model, tmp_path / "dense", format="dense")
    assert not (tmp_path / "dense" / "config.json").exists()
    secateur.export(model, tmp_path / "dense", format="dense")
    assert same_bytes(tmp_path / "dense", tmp_path / "whole")
    with pytest.raises(OutputError, match="not empty"):
        secateur.export(model, tmp_path / "dense", format="dense")
