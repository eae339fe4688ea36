"""Heads of families whose classes derive the width of a head: fewer of them, as wide as they were."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS, How, loaded_elsewhere
from small_runs import interrupted, same_bytes
from tiny_models import save_tiny, tiny_config
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import norm_over, units_of
from secateur.core.errors import AnatomyError, RecipeError
from secateur.formats.loads_in import loads_in

FAMILIES = ["gpt2", "opt", "gpt_neox"]
prune = partial(small_runs.prune, sparsity=0.3)


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def heads_of(folder: Path) -> list[int]:
    """By block, as the files have them."""
    blocks = resolve(AutoModelForCausalLM.from_pretrained(folder).config).blocks
    return [units.count for block in blocks for units in units_of(block) if units.kind == "heads"]


@pytest.mark.parametrize(
    ("family", "how"), [("gpt2", "remote"), ("opt", "remote"), ("gpt_neox", "remote"), ("gpt2", "import")]
)
def test_blocks_with_fewer_heads_load_in_a_fresh_process(family: str, how: How, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3)
    out = tmp_path / "out"
    report = prune(model, out, method="wanda-structure", options={"spread": "global"})
    assert report.structure is not None
    heads = heads_of(out)
    assert len(set(heads)) > 1
    assert sum(heads) == report.structure.units_after["heads"] < 24
    assert report.structure.kv_bytes_per_token_after == 4 * 2 * 8 * sum(heads)
    assert any("import secateur" in warning for warning in report.warnings)
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    there = loaded_elsewhere(out, how)
    assert torch.equal(there.logits, here(IDS).logits)
    assert there.parameters == report.parameters_after


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_blocks_ask_for_the_code_too_and_name_what_does_not(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3)
    report = prune(model, tmp_path / "out", method="wanda-structure")
    assert report.structure is not None
    assert not report.structure.stock
    assert set(heads_of(tmp_path / "out")) == {6}
    near = report.structure.uniform
    assert near is not None
    assert near.stock
    assert near.units_a_block["heads"] == 8
    found = loads_in(config_of(tmp_path / "out"), [])
    assert found["vllm"].startswith("no: ")
    scores = str(tmp_path / "out" / "scores.safetensors")
    options = {"uniform": True}
    equal = prune(model, tmp_path / "equal", method="wanda-structure", options=options, scores=scores)
    assert (equal.parameters_after, equal.bytes_after) == (near.parameters, near.bytes)
    assert any("All heads stay" in warning for warning in equal.warnings)
    assert config_of(tmp_path / "equal")["model_type"] == family
    assert loaded_elsewhere(tmp_path / "equal").parameters == equal.parameters_after


def test_heads_alone_have_no_stock_class(tmp_path: Path) -> None:
    model = save_tiny("opt", tmp_path / "model", num_hidden_layers=3)
    options = {"targets": "heads", "uniform": True}
    sparsity = 0.141
    with pytest.raises(RecipeError, match="all heads of opt"):
        prune(model, tmp_path / "out", method="magnitude-structure", sparsity=sparsity, options=options)
    report = prune(
        model, tmp_path / "out", method="magnitude-structure", sparsity=sparsity, options={"targets": "heads"}
    )
    assert report.structure is not None
    assert not report.structure.stock


@pytest.mark.parametrize("family", ["olmo2", "olmoe"])
def test_heads_under_one_norm_are_refused(family: str, tmp_path: Path) -> None:
    """The mean of what is left is another one, so that no head would be what it was."""
    model = save_tiny(family, tmp_path / "model")
    with pytest.raises(AnatomyError, match=r"q_norm\.weight belongs to one norm.*targets=ffn"):
        prune(model, tmp_path / "out", method="magnitude-structure", sparsity=0.1)
    assert not (tmp_path / "out").exists()


def test_channels_of_a_family_whose_heads_stay_go(tmp_path: Path) -> None:
    model = save_tiny("olmo2", tmp_path / "model")
    report = prune(model, tmp_path / "out", method="magnitude-structure", options={"targets": "ffn"})
    assert report.structure is not None
    assert report.structure.stock


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "deepseek_v3", "gpt_oss", "gpt_neox"])
def test_norms_and_sinks_of_single_heads_are_none_over_all(family: str) -> None:
    blocks = resolve(tiny_config(family)).blocks
    assert all(norm_over(block, units) is None for block in blocks for units in units_of(block))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "then",
    [
        {"method": "wanda-structure", "sparsity": 0.2},
        {"method": "slicegpt", "sparsity": 0.2, "options": {"round_to": 1}},
        {"method": "blockpruner", "sparsity": 0.3},
        {"method": "shortgpt", "sparsity": 0.3},
        {"method": "sparsegpt", "sparsity": 0.5},
    ],
    ids=lambda then: then["method"],
)
def test_what_has_lost_heads_is_pruned_again(family: str, then: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "once", method="wanda-structure", sparsity=0.2, options={"spread": "global"})
    prune(tmp_path / "once", tmp_path / "twice", **then)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.float32).eval()
    with_cache, without = (here.generate(IDS, max_new_tokens=5, use_cache=cache) for cache in (True, False))
    assert torch.equal(with_cache, without)
    assert heads_of(tmp_path / "twice")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_model_loses_heads(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "once", method="slicegpt", sparsity=0.2, options={"round_to": 1})
    prune(tmp_path / "once", tmp_path / "twice", method="wanda-structure", sparsity=0.2)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.float32).eval()
    assert max(heads_of(tmp_path / "twice")) < 8
    assert torch.equal(loaded_elsewhere(tmp_path / "twice", "remote").logits, here(IDS).logits)


def test_a_narrower_model_comes_before_fewer_heads(tmp_path: Path) -> None:
    """The hidden size says how wide rotated parts of heads are: it must not change under them."""
    model = save_tiny("gpt_neox", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "heads", method="wanda-structure", sparsity=0.2)
    with pytest.raises(RecipeError):
        prune(tmp_path / "heads", tmp_path / "out", method="minitron", sparsity=0.25)
    prune(model, tmp_path / "narrow", method="minitron", sparsity=0.25)
    narrow = len(heads_of(tmp_path / "narrow"))
    prune(tmp_path / "narrow", tmp_path / "both", method="wanda-structure", sparsity=0.2)
    assert len(heads_of(tmp_path / "both")) == narrow
    assert heads_of(tmp_path / "both") < heads_of(tmp_path / "narrow")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_what_has_lost_heads_is_mended(how: str, tmp_path: Path) -> None:
    model = save_tiny("gpt_neox", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "once", method="flap", sparsity=0.2)
    secateur.recover(
        tmp_path / "once", tmp_path / "mended", how=how, text=str(tmp_path / "text.txt"), tokens=400,
        length=24, batch_size=4, validation_windows=2, evaluation_windows=2, measure_speed=False,
    )  # fmt: skip
    assert heads_of(tmp_path / "mended") == heads_of(tmp_path / "once")


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = save_tiny("gpt_neox", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    prune(model, tmp_path / "whole", method="osscar")
    with interrupted(after=2):
        prune(model, tmp_path / "out", method="osscar")
    prune(model, tmp_path / "out", method="osscar", resume=True)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors")
