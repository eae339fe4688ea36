"""Experts away on files: what stays is as it was, loads in the stock class, and is what a method chose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from elsewhere import loaded_elsewhere
from safetensors.torch import load_file
from small_runs import interrupted, prune, same_bytes, text_beside
from tiny_models import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.resolve import resolve
from secateur.checkpoint.reader import Checkpoint
from secateur.cli.app import run
from secateur.core.errors import InputError, OutputError, RecipeError

FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "gpt_oss": {},
    "deepseek_v3": {"n_routed_experts": 8},
}
IDS = torch.arange(1, 25).view(2, 12)


def without(model: Path, kept: dict[int, list[int]]) -> Any:
    """The dense model whose modules were given fewer experts by hand."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for block in resolve(dense.config).blocks:
        mixture = mixture_of(block)
        if mixture is None:
            continue
        own, stays = dense.get_submodule(block.prefix), torch.tensor(kept[block.index])
        for name, axes in block.axes.items():
            if axes and axes[0].segments[0].space == mixture.space:
                path, _, last = name.rpartition(".")
                owner = own.get_submodule(path)
                cut = getattr(owner, last).detach()[stays]
                setattr(owner, last, nn.Parameter(cut) if last in owner._parameters else cut)
        for module in own.modules():
            for count in ("num_experts", "num_local_experts", "n_routed_experts"):
                if hasattr(module, count):
                    setattr(module, count, len(stays))
    return dense


def chosen(out: Path, share: float) -> dict[int, list[int]]:
    """The experts with the largest scores of each block."""
    found = load_file(out / "scores.safetensors")
    scores = {int(name.split(".")[0]): own for name, own in found.items() if name.endswith(".experts")}
    return {
        index: sorted(own.argsort(stable=True)[round(share * len(own)) :].tolist())
        for index, own in scores.items()
    }


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_what_stays_is_as_it_was_and_the_stock_class_loads_it(family: str, tmp_path: Path) -> None:
    model, out = save_tiny(family, tmp_path / "model", **FAMILIES[family]), tmp_path / "out"
    report = prune(model, out, method="reap", sparsity=0.25)
    expected = without(model, chosen(out, 0.25))(IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not type(loaded).__name__.startswith("Secateur")
    assert report.parameters_after == sum(p.numel() for p in loaded.parameters())
    assert report.sparsity == 0.25
    assert report.bytes_after < report.bytes_before


def test_the_disk_needs_room_for_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the result, and a little more, is less than twice the model."""
    model, out = save_tiny("qwen3_moe", tmp_path / "model"), tmp_path / "out"
    planned = secateur.plan(model, method="reap", sparsity=0.25)
    assert planned["exact"]
    assert planned["disk_bytes"] == int(2.1 * planned["bytes_after"]) < 2 * planned["bytes_before"]
    free = planned["disk_bytes"] - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OutputError, match="GB are free"):
        prune(model, out, method="reap", sparsity=0.25)
    free += 1
    prune(model, out, method="reap", sparsity=0.25)


def test_groups_of_a_router_lose_as_many_each(tmp_path: Path) -> None:
    model, out = save_tiny("deepseek_v3", tmp_path / "model", n_routed_experts=8), tmp_path / "out"
    prune(model, out, method="frequency-experts", sparsity=0.25)
    scores = load_file(out / "scores.safetensors")
    kept = {}
    for index in (1, 2):
        groups = scores[f"{index}.experts"].view(2, 4).argsort(dim=1, stable=True)[:, 1:]
        kept[index] = sorted((groups + torch.tensor([[0], [4]])).flatten().tolist())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(IDS).logits, without(model, kept)(IDS).logits, rtol=1e-4, atol=1e-5)


def test_equal_experts_become_one_for_nothing(tmp_path: Path) -> None:
    """With weights of the router renormalised, a token that visits two equal experts sees one of them."""
    model, out = save_tiny("mixtral", tmp_path / "model", num_local_experts=8), tmp_path / "out"
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for block in dense.model.layers:
            for stack in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                stack[4:] = stack[:4]
            block.mlp.gate.weight[4:] = block.mlp.gate.weight[:4]
    dense.save_pretrained(model)
    prune(model, out, method="stun", sparsity=0.5, options={"dead": "cluster"})
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    for block, whole in zip(loaded.model.layers, dense.model.layers, strict=True):
        assert torch.equal(block.mlp.experts.down_proj, whole.mlp.experts.down_proj[:4])
        assert torch.equal(block.mlp.gate.weight, whole.mlp.gate.weight[:4])
    report = prune(model, tmp_path / "merged", method="merge-experts", sparsity=0.5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-5)
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    ("spread", "how"), [("uniform", "stock"), ("global", "import"), ("global", "remote")]
)
def test_it_loads_generates_and_learns_in_a_fresh_process(spread: str, how: Any, tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", num_experts=8, num_hidden_layers=3)
    out = tmp_path / "out"
    report = prune(model, out, method="random-experts", sparsity=0.25, options={"spread": spread})
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    seen = loaded_elsewhere(out, how)
    assert torch.equal(seen.logits, here(IDS, labels=IDS).logits)
    assert seen.parameters == report.parameters_after
    assert seen.name.startswith("Secateur") == (spread == "global")
    counts = [block.mlp.experts.down_proj.shape[0] for block in here.model.layers]
    assert sum(counts) == 18
    assert (len(set(counts)) > 1) == (spread == "global")


@pytest.mark.parametrize("method", ["reap", "merge-experts"])
def test_an_interrupted_run_ends_in_the_same_bytes(method: str, tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model", num_hidden_layers=3, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"method": method, "sparsity": 0.25}
    prune(model, tmp_path / "whole", **settings)
    with interrupted(1):
        prune(model, tmp_path / "out", **settings)
    prune(model, tmp_path / "out", resume=True, **settings)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors", "experts.json")


@pytest.mark.parametrize("method", ["reap", "merge-experts"])
def test_which_experts_stay_and_what_they_stand_for_lies_beside_the_model(
    method: str, tmp_path: Path
) -> None:
    model = save_tiny("deepseek_v3", tmp_path / "model", n_routed_experts=8)  # block 0 has no experts
    prune(model, tmp_path / "out", method=method, sparsity=0.25)
    content = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert (content["version"], content["method"], [*content["blocks"]]) == (1, method, ["1", "2"])
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    visits = load_file(tmp_path / "out" / "scores.safetensors")
    for index, own in content["blocks"].items():
        whole, left = (m.model.layers[int(index)].mlp.experts.down_proj for m in (dense, loaded))
        assert ("clusters" in own) == (method == "merge-experts")
        clusters = own.get("clusters") or [[one] for one in own["kept"]]
        assert all(one in cluster for one, cluster in zip(own["kept"], clusters, strict=True))
        weights = visits[f"{index}.experts.counts"].float()
        for place, cluster in enumerate(clusters):
            share = weights[cluster] / weights[cluster].sum()
            share = share if share.isfinite().all() else torch.full_like(share, 1 / len(cluster))
            mean = torch.einsum("n,nij->ij", share, whole[cluster])
            torch.testing.assert_close(left[place], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["parameters", "bytes"])
def test_a_budget_takes_as_few_experts_as_it_needs(kind: str, spread: str, tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model", num_experts=8, num_hidden_layers=3)
    settings: dict[str, Any] = {
        "method": "frequency-experts", "budget": f"{kind}=0.8x", "options": {"spread": spread}
    }  # fmt: skip
    planned = secateur.plan(model, **settings)
    report = prune(model, tmp_path / "out", evaluation_windows=0, **settings)
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    sizes = [(one.parameters, one.nbytes) for one in (before, after)]
    dense, size = (own[kind == "bytes"] for own in sizes)
    experts = json.loads((tmp_path / "out" / "experts.json").read_text())["blocks"]
    gone = 24 - sum(len(own["kept"]) for own in experts.values())
    one = (dense - size) / gone
    step = one if spread == "global" else 3 * one  # what goes together
    assert size <= 0.8 * dense < size + step
    assert (planned["parameters_after"], planned["bytes_after"]) == sizes[1]
    assert planned["sparsity"] == report.sparsity == report.sparsity_requested == pytest.approx(gone / 24)
    assert planned["budget"] == report.budget == settings["budget"]
    assert report.structure is not None
    assert report.structure.budget is not None
    budget = report.structure.budget
    assert (budget.unit, budget.planned, budget.dense) == (kind, size, dense)
    assert budget.limit == pytest.approx(0.8 * dense)


def test_a_budget_leaves_whole_groups_of_a_router(tmp_path: Path) -> None:
    model = save_tiny("deepseek_v3", tmp_path / "model", n_routed_experts=8)
    report = prune(
        model, tmp_path / "out", method="random-experts", budget="bytes=0.93x", evaluation_windows=0
    )
    assert report.sparsity == 0.25
    assert 0.8 < report.bytes_after / report.bytes_before <= 0.93


def test_budgets_out_of_reach_are_refused(tmp_path: Path) -> None:
    model, out = save_tiny("mixtral", tmp_path / "model"), tmp_path / "out"
    for budget, words in (
        ("parameters=0.1x", r"at least .*: what is no expert, and the 2 experts that every block keeps"),
        ("parameters=9B", "less than the dense model has"),
        ("decode=0.8x", r"visits as many experts as before.*--budget bytes="),
    ):
        with pytest.raises(RecipeError, match=words):
            prune(model, out, method="reap", budget=budget)
        with pytest.raises(RecipeError, match=words):
            secateur.plan(model, method="reap", budget=budget)
    assert not out.exists()


def test_scores_of_a_run_plan_other_shares_without_text(tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model", num_local_experts=8)
    for method in ("reap", "merge-experts"):
        first, again, whole = (tmp_path / f"{method}-{name}" for name in ("first", "again", "whole"))
        prune(model, first, method=method, sparsity=0.25)
        scores = str(first / "scores.safetensors")
        report = prune(model, again, method=method, sparsity=0.5, scores=scores)
        assert report.calibration is None
        prune(model, whole, method=method, sparsity=0.5)
        assert same_bytes(again, whole)
        with pytest.raises(InputError, match="scores of method"):
            prune(model, tmp_path / "no", method="stun", sparsity=0.5, scores=scores)


def test_experts_that_nothing_visited_are_told_and_go_first(tmp_path: Path) -> None:
    model, out = save_tiny("gpt_oss", tmp_path / "model"), tmp_path / "out"
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for block in dense.model.layers:
            block.mlp.router.bias[2] = -1e4
    dense.save_pretrained(model)
    report = prune(model, out, method="frequency-experts", sparsity=0.25)
    assert any("visited experts 2 of block 0; 2 of block 1" in warning for warning in report.warnings)
    assert [row.notes["visits_kept"] for row in report.layers] == [1, 1]
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_visits_on_the_evaluation_text_are_counted_and_drawn(tmp_path: Path) -> None:
    model, out = save_tiny("qwen3_moe", tmp_path / "model"), tmp_path / "out"
    report = prune(model, out, method="reap", sparsity=0.25, calibration={"samples": 2})
    visits = report.expert_visits
    assert visits is not None
    tokens, top_k = 2 * 24, 2
    assert {len(own) for own in visits.before.values()} == {4}
    assert {len(own) for own in visits.after.values()} == {3}
    for own in (*visits.before.values(), *visits.after.values()):
        assert sum(own) == tokens * top_k
    assert "Load of the experts" in (out / "report.html").read_text(encoding="utf-8")
    alone = prune(
        save_tiny("llama", tmp_path / "dense"), tmp_path / "plain", method="magnitude", sparsity=0.5
    )
    assert alone.expert_visits is None
    assert "Load of the experts" not in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")


def test_what_a_plan_promises_is_what_comes_out(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    plan = secateur.plan(model, method="random-experts", sparsity=0.25)
    report = prune(model, tmp_path / "out", method="random-experts", sparsity=0.25)
    assert plan["parameters_after"] == report.parameters_after
    assert plan["bytes_after"] == report.bytes_after
    assert not plan["faster"]


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny("mixtral", tmp_path / "model"), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"a token visits 2, and every block keeps 2"):
        prune(model, out, method="reap", sparsity=0.75)
    with pytest.raises(RecipeError, match=r"0\.250, 0\.500"):
        prune(model, out, method="reap", sparsity=0.4)
    grouped = save_tiny("deepseek_v3", tmp_path / "grouped", n_routed_experts=8)
    with pytest.raises(RecipeError, match="every block keeps 4"):
        prune(grouped, out, method="reap", sparsity=0.75)
    dense = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RecipeError, match="mixture of experts"):
        prune(dense, out, method="stun", sparsity=0.25)
    text = text_beside(model)
    assert (
        run(["prune", str(dense), "-o", str(out), "--method", "reap", "--sparsity", "0.5", "--text", text])
        == 2
    )
    assert "mixture of experts" in capsys.readouterr().err
    assert not out.exists()


def test_one_experts_files_are_named_on_disk_as_the_family_does(tmp_path: Path) -> None:
    model, out = save_tiny("qwen3_moe", tmp_path / "model"), tmp_path / "out"
    prune(model, out, method="random-experts", sparsity=0.25)
    names = set(load_file(out / "model.safetensors"))
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in names
    assert "model.layers.1.mlp.experts.3.down_proj.weight" not in names
    config = json.loads((out / "config.json").read_text())
    assert {config.get("num_experts", 3), config.get("num_local_experts", 3)} == {3}
