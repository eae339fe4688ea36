"""LLM-Pruner's other modes and its steps: what is dead goes first, and steps are runs one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from small_runs import same_bytes
from tiny_models import save_dead, save_tiny, undo_mean
from transformers import AutoModelForCausalLM

import secateur
from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows
from secateur.checkpoint.locate import locate
from secateur.core.errors import AnatomyError, RecipeError
from secateur.core.method import METHODS
from secateur.core.progress import SILENT
from secateur.pipeline.state import Run
from secateur.pipeline.ways.unit_gradients import block_gradients, stream_gradients
from secateur.pipeline.ways.width import on_top
from secateur.structure.llm_pruner import LlmPruner, LlmPrunerChannels, LlmPrunerLayers

IDS = torch.arange(1, 25).view(2, 12)
DEAD = torch.arange(3, 59, 7)


prune = partial(small_runs.prune, method="llm-pruner", sparsity=0.25, evaluation_windows=0)


@pytest.mark.parametrize("order", ["first", "second", "mixed", "vector"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_dimension_that_nothing_writes_scores_nothing_and_goes(
    order: str, tied: bool, tmp_path: Path
) -> None:
    dense = save_dead(tmp_path / "model", DEAD, tie_word_embeddings=tied)
    options = {"mode": "channel", "order": order}
    report = prune(tmp_path / "model", tmp_path / "out", options=options, sparsity=len(DEAD) / 64)
    scores = load_file(tmp_path / "out" / "scores.safetensors")["hidden"]
    assert (scores == 0).nonzero().flatten().tolist() == DEAD.tolist()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert pruned.config.hidden_size == 64 - len(DEAD)
    assert pruned.num_parameters() == report.parameters_after
    undo_mean(pruned, 64)
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_dimension_is_felt_in_everything_that_touches_it_once(tmp_path: Path) -> None:
    """Members: two norms and seven matrices a block, the last norm, and a tied embedding once; a norm is the
    root. The signed sum over all of them is the derivative of the loss to the scale of the dimension, which
    norms undo: with gains as they are it is not zero, and autograd agrees."""
    dense = AutoModelForCausalLM.from_pretrained(
        save_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    )
    windows = Windows.of(IDS)
    driver = Driver(MemorySource(dense), windows)
    method = LlmPruner.from_options({"mode": "channel", "order": "vector"})
    found = stream_gradients(driver, method, tmp_path / "scratch", SILENT)["taylor_vector"]
    assert found.shape == (9 * 2 + 2, 64)
    losses = [dense(ids[None], labels=ids[None], use_cache=False).loss for ids in IDS]
    torch.stack(losses).mean().backward()
    by_hand = torch.zeros(64, dtype=torch.float64)
    for name, parameter in dense.named_parameters():
        felt = (parameter * parameter.grad).double()
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        by_hand += felt if felt.dim() == 1 else felt.sum(1 if last else 0)
    torch.testing.assert_close(found.sum(0), by_hand, rtol=1e-4, atol=1e-7)
    norm = dense.model.layers[0].input_layernorm.weight
    root = LlmPruner.from_options({"mode": "channel", "order": "vector", "aggregation": "root"})
    felt = root.rank({"taylor_vector": found})
    torch.testing.assert_close(felt, (norm * norm.grad).double().abs(), rtol=1e-4, atol=1e-9)


def test_a_block_that_does_nothing_goes_first(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        dense.model.layers[2].self_attn.o_proj.weight.zero_()
        dense.model.layers[2].mlp.down_proj.weight.zero_()
    dense.save_pretrained(model)
    report = prune(model, tmp_path / "out", options={"mode": "layer"})
    assert [row.sparsity for row in report.layers] == [0, 0, 1, 0]
    assert report.layers[2].notes["importance"] == 0 < report.layers[0].notes["importance"]
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits)
    report = prune(model, tmp_path / "first", options={"mode": "layer", "keep": "first"})
    assert [row.sparsity for row in report.layers] == [0, 0, 0, 1]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


FFN = {"mode": "block", "targets": "ffn", "protect_first": 0, "protect_last": 0}
# options, share of a first run, of what is left then, and of both: 12 of 96 channels, 8 of 64, 1 of 4
STEPS = {
    "block": (FFN, 0.08, 9216 / 105984, 0.16),
    "channel": ({"mode": "channel"}, 1 / 8, 1 / 7, 1 / 4),
    "layer": ({"mode": "layer"}, 1 / 4, 1 / 3, 1 / 2),
}


@pytest.mark.parametrize("mode", STEPS)
def test_two_steps_are_two_runs(mode: str, tmp_path: Path) -> None:
    """The second step scores the smaller model: what comes out is the same."""
    options, first, second, both = STEPS[mode]
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    prune(model, tmp_path / "half", options=options, sparsity=first)
    prune(tmp_path / "half", tmp_path / "two", options=options, sparsity=second)
    prune(model, tmp_path / "steps", options={**options, "steps": 2}, sparsity=both)
    prune(model, tmp_path / "one", options=options, sparsity=both)
    two, steps = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "steps"))
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert two.keys() == steps.keys() == one.keys()
    assert all(two[name].equal(steps[name]) for name in two)
    if mode != "layer":
        assert not all(one[name].equal(steps[name]) for name in one)


def test_blocks_are_scored_again_without_those_that_went(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    options = {"mode": "layer"}
    once = prune(model, tmp_path / "half", options=options, sparsity=0.25)
    twice = prune(tmp_path / "half", tmp_path / "two", options=options, sparsity=1 / 3)
    steps = prune(model, tmp_path / "steps", options={**options, "steps": 2}, sparsity=0.5)
    [first] = [row.block for row in once.layers if row.sparsity]
    found = [[row.notes["importance"] for row in report.layers] for report in (once, twice, steps)]
    left = [block for block in range(4) if block != first]
    assert [found[2][block] for block in left] == pytest.approx(found[1], rel=1e-4)
    assert [found[2][block] for block in left] != pytest.approx([found[0][block] for block in left], rel=1e-2)
    assert found[2][first] == found[0][first]


def test_steps_that_look_at_their_own_windows(tmp_path: Path) -> None:
    model, options = save_tiny("llama", tmp_path / "model"), {**FFN, "steps": 2}
    prune(model, tmp_path / "all", options=options)
    prune(model, tmp_path / "own", options={**options, "step_windows": 3})
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("all", "own")]
    assert plans[0]["counts"] == plans[1]["counts"]
    assert plans[0]["blocks"] != plans[1]["blocks"]


@pytest.mark.parametrize("spread", ["uniform", "global", "knapsack"])
def test_what_went_in_the_first_step_does_not_come_back(spread: str, tmp_path: Path) -> None:
    model, options = save_tiny("llama", tmp_path / "model", num_hidden_layers=4), {"spread": spread}
    prune(model, tmp_path / "half", options=options, sparsity=0.15)
    prune(model, tmp_path / "steps", options={**options, "steps": 2}, sparsity=0.3)
    half, steps = (
        json.loads((tmp_path / name / "plan.json").read_text())["blocks"] for name in ("half", "steps")
    )
    for earlier, later in zip(half, steps, strict=True):
        assert all(set(later[kind]) <= set(earlier[kind]) for kind in earlier)
    assert not (tmp_path / "steps" / "scores.safetensors").exists()


def test_what_went_stays_below_what_is_left() -> None:
    before = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]).double()
    found = on_top(before, torch.tensor([0, 4, 2]), torch.tensor([0.0, 9.0, 0.5]).double())
    assert found.argsort().tolist() == [1, 3, 0, 2, 4]
    assert on_top(before, torch.arange(5), before).equal(before)


@pytest.mark.parametrize("mode", STEPS)
def test_an_interrupted_run_of_steps_ends_in_the_same_bytes(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4, dtype=torch.bfloat16)
    options, _, _, both = STEPS[mode]
    settings = {"options": {**options, "steps": 2}, "sparsity": both}
    prune(model, tmp_path / "whole", **settings)
    remembered, keep = Run.remembered, Run.keep

    def after_one_round(self: Run, find: Any, name: str = "scores.safetensors") -> Any:
        if name == "round-1.safetensors":
            raise KeyboardInterrupt
        return remembered(self, find, name)

    def after_one_block(self: Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        keep(self, index, *rest)

    for number, (name, stop) in enumerate((("remembered", after_one_round), ("keep", after_one_block))):
        with monkeypatch.context() as patch:
            patch.setattr(Run, name, stop)
            with pytest.raises(KeyboardInterrupt):
                prune(model, tmp_path / "out", resume=number > 0, **settings)
    prune(model, tmp_path / "out", resume=True, **settings)
    assert same_bytes(tmp_path / "out", tmp_path / "whole")


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 25).view(2, 12)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.save(model(ids).logits, folder + "/logits.pt")
    same = [model.generate(ids, use_cache=c, max_new_tokens=5, do_sample=False) for c in (True, False)]
    assert torch.equal(*same)
assert "secateur" not in sys.modules
"""


def test_narrower_and_shallower_models_load_where_secateur_is_not(tmp_path: Path) -> None:
    folders = []
    for family in ("qwen3", "gemma2"):
        model = save_tiny(family, tmp_path / family, num_hidden_layers=3)
        for mode, sparsity in (("channel", 0.25), ("layer", 0.34)):
            folders.append(str(tmp_path / f"{family}-{mode}"))
            prune(model, Path(folders[-1]), options={"mode": mode}, sparsity=sparsity)
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True, cwd=tmp_path)
    for folder in folders:
        here = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(torch.load(f"{folder}/logits.pt"), here(IDS).logits)


def test_a_mode_has_options_of_its_own() -> None:
    assert type(LlmPruner.from_options({"mode": "channel"})) is LlmPrunerChannels
    assert type(LlmPruner.from_options({"mode": "layer", "steps": 2})) is LlmPrunerLayers
    assert type(METHODS.get("llm-pruner").from_options({})) is LlmPruner
    with pytest.raises(RecipeError, match="'block', 'channel' or 'layer'"):
        LlmPruner.from_options({"mode": "head"})
    with pytest.raises(RecipeError, match="spread"):
        LlmPruner.from_options({"mode": "channel", "spread": "global"})
    with pytest.raises(RecipeError, match="first"):
        LlmPruner.from_options({"mode": "layer", "keep": "first", "steps": 2})
    [facts] = secateur.methods("llm-pruner")
    described = {option["name"]: option["description"] for option in facts["options"]}
    assert described["keep"].startswith("mode=layer: ")
    assert described["round_to"].startswith("widths")


def test_what_steps_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    prune(model, tmp_path / "once", options={})
    scores = str(tmp_path / "once" / "scores.safetensors")
    with pytest.raises(RecipeError, match="after every step"):
        prune(model, tmp_path / "out", options={"steps": 2}, scores=scores)
    with pytest.raises(RecipeError, match="at once"):
        prune(model, tmp_path / "out", options={"steps": 2, "remove_heads": 1})
    with pytest.raises(RecipeError, match="whole heads make"):  # half of it is less than one head a block
        prune(
            model,
            tmp_path / "out",
            options={"steps": 2, "targets": "heads", "protect_first": 0},
            sparsity=0.172,
        )
    with pytest.raises(RecipeError, match="budget"):
        prune(model, tmp_path / "out", options={"mode": "channel"}, sparsity=None, budget="parameters=0.8x")
    with pytest.raises(RecipeError, match=r"0\.25, 0\.375"):  # 8 heads: multiples of 8
        prune(model, tmp_path / "out", options={"mode": "channel", "round_to": 1}, sparsity=0.3)
    unlisted = save_tiny("stablelm", tmp_path / "unlisted", num_hidden_layers=4)
    with pytest.raises(AnatomyError, match="family file"):
        prune(unlisted, tmp_path / "out", options={"mode": "layer", "steps": 2}, sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_blocks_rank_like_the_true_loss_on_a_trained_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(locate("seedling"), dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        start = torch.randint(5, model.config.vocab_size, (8, 1))
        ids = model.generate(start, max_new_tokens=47, min_new_tokens=47, do_sample=True)
    driver = Driver(MemorySource(model), Windows.of(ids))
    method = LlmPruner.from_options({"mode": "layer"})
    importance = method.rank(block_gradients(driver, method, tmp_path / "scratch", SILENT))
    grown, blocks = [], list(model.model.layers)
    for gone in range(len(blocks)):
        model.model.layers = torch.nn.ModuleList(block for n, block in enumerate(blocks) if n != gone)
        with torch.no_grad():
            grown.append(float(model(ids, labels=ids, use_cache=False).loss))
    truth = torch.tensor(grown)
    ranks = torch.stack([importance.argsort().argsort(), truth.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.3, (importance, truth)
