"""Pruning in many small steps: what it looks at, where it stops, and that it can be killed at any step."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from elsewhere import IDS
from safetensors.torch import load_file
from small_runs import interrupted, same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.anatomy.resolve import resolve
from secateur.anatomy.units import units_of
from secateur.calibration.windows import load_windows
from secateur.core.errors import AnatomyError, InputError, RecipeError
from secateur.pipeline.ways import adaptive
from secateur.structure.adapt_pruner import AdaptPruner
from secateur.structure.llm_pruner import LlmPruner

STEP = {"step": 0.1, "amplitude": 0.05}
prune = partial(small_runs.prune, method="adapt-pruner", sparsity=0.3, options=STEP)


def history_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "history.json").read_text())
    return rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", num_hidden_layers=4, dtype=torch.bfloat16)


def test_it_stops_within_one_channel_of_the_budget(model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out")
    rows = history_of(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(model)
    blocks = sum(p.numel() for p in dense.model.layers.parameters())
    channel = 3 * dense.config.hidden_size
    freed = report.parameters_before - report.parameters_after
    assert 0 <= 0.3 * blocks - freed < channel
    assert report.sparsity == pytest.approx(freed / blocks)
    counts = [row["parameters"] for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == report.parameters_after
    assert report.allocation == "adaptive"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after
    for layer, width in zip(loaded.model.layers, rows[-1]["removed"]["ffn"].values(), strict=True):
        assert layer.mlp.up_proj.out_features == round((1 - width) * 96)


def test_targets_follow_from_what_was_measured(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "out")
    method, targets = AdaptPruner.from_options(STEP), torch.zeros(4).double()
    for row in history_of(tmp_path / "out"):
        more = method.increments(torch.tensor(row["moves"]).double())
        assert row["increments"] == pytest.approx(more.tolist())
        assert float(more.mean()) == pytest.approx(0.1)
        targets = targets + more
        assert row["targets"] == pytest.approx(targets.tolist(), abs=1e-7)
        for shares in row["removed"].values():
            assert all(share <= targets[int(block)] + 1e-7 for block, share in shares.items())


def test_a_block_that_does_nothing_loses_most(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    dense = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        dense.model.layers[2].self_attn.o_proj.weight.zero_()
        dense.model.layers[2].mlp.down_proj.weight.zero_()
    dense.save_pretrained(model)
    prune(model, tmp_path / "out", sparsity=0.2)
    rows = history_of(tmp_path / "out")
    assert all(row["moves"][2] == pytest.approx(0, abs=1e-6) for row in rows)
    assert all(max(row["increments"]) == row["increments"][2] for row in rows)
    removed = rows[-1]["removed"]["ffn"]
    assert removed["2"] == max(removed.values()) > max(share for at, share in removed.items() if at != "2")


def test_equal_blocks_lose_the_same(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "out", options={"amplitude": 0, "step": 0.1})
    for row in history_of(tmp_path / "out")[:-1]:
        assert row["increments"] == [0.1] * 4
        assert all(len(set(shares.values())) == 1 for shares in row["removed"].values())


def test_without_amplitude_it_is_llm_pruner_in_steps_on_a_model_that_is_cut(tmp_path: Path) -> None:
    """Each step: score all blocks of the smaller model, remove a tenth of the first sizes from each."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    options = {"amplitude": 0, "step": 0.125, "targets": "ffn"}
    channels = 3 * 64 * 96 * 3
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).model.layers.parameters())
    sparsity = 0.5 * channels / total + 1e-6
    prune(model, tmp_path / "out", sparsity=sparsity, options=options)
    taken = load_file(tmp_path / "out" / "steps.safetensors")
    source: str | Path = model
    left = [torch.arange(96) for _ in range(3)]
    for step in range(1, 5):
        share = 12 * 3 * 64 * 3 / sum(_sizes(Path(source))) + 1e-6
        out = tmp_path / f"step-{step}"
        plain = {"targets": "ffn", "protect_first": 0, "protect_last": 0}
        prune(Path(source), out, method="llm-pruner", sparsity=share, options=plain)
        scores = load_file(out / "scores.safetensors")
        for block in range(3):
            gone = scores[f"{block}.ffn"].argsort(stable=True)[:12]
            assert set((taken[f"{block}.ffn"] == step).nonzero().flatten().tolist()) == set(
                left[block][gone].tolist()
            )
            stays = torch.ones(len(left[block]), dtype=torch.bool)
            stays[gone] = False
            left[block] = left[block][stays]
        source = out
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", Path(source)))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def _sizes(model: Path) -> list[int]:
    dense = AutoModelForCausalLM.from_pretrained(model)
    return [sum(p.numel() for p in layer.parameters()) for layer in dense.model.layers]


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
def test_killed_after_any_step_it_ends_in_the_same_bytes(
    compensate: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**STEP, "compensate": compensate, "step_windows": 4}
    prune(model, tmp_path / "whole", options=options)
    steps = len(history_of(tmp_path / "whole"))
    assert steps >= 3
    taken = adaptive._step
    for left in (1, steps - 1):
        with interrupted(left, adaptive, "_step"):
            prune(model, tmp_path / f"out-{left}", options=options)
        with monkeypatch.context() as patch:
            calls: list[int] = []
            patch.setattr(adaptive, "_step", lambda *a: calls.append(1) or taken(*a))  # noqa: B023
            prune(model, tmp_path / f"out-{left}", options=options, resume=True)
            assert len(calls) == steps - left
        assert same_bytes(tmp_path / f"out-{left}", tmp_path / "whole", "history.json", "steps.safetensors")


def test_what_is_gone_has_no_say_in_later_steps(model: Path, tmp_path: Path) -> None:
    """A model with silenced columns is the cut one: the same loss before the last step."""
    prune(model, tmp_path / "out")
    rows, taken = history_of(tmp_path / "out"), load_file(tmp_path / "out" / "steps.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    blocks = resolve(dense.config).blocks
    with torch.no_grad():
        for block in blocks:
            for units in units_of(block):
                steps = taken[f"{block.index}.{units.kind}"]
                gone = ((steps > 0) & (steps < len(rows))).nonzero().flatten()
                view = units.writer.view(dict(dense.get_submodule(block.prefix).state_dict()))
                view[:, units.columns(gone)] = 0
        ids = windows_of(model)
        loss = float(dense(ids, labels=ids, use_cache=False).loss)
    assert rows[-1]["loss"] == pytest.approx(loss, rel=1e-4)


def windows_of(model: Path) -> torch.Tensor:
    """The calibration windows of `prune`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_windows(text_beside(model), tokenizer=tokenizer, samples=6, length=24).ids


def test_protected_blocks_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    before = load_file(model / "model.safetensors")
    for method in ("adapt-pruner", "llm-pruner", "flap"):
        options = {"protect_first": 0.25, "protect_last": 0.25}
        report = prune(model, tmp_path / method, method=method, sparsity=0.2, options=options)
        assert report.sparsity == pytest.approx(0.2, abs=0.005)
        after = load_file(tmp_path / method / "model.safetensors")
        for name, tensor in before.items():
            if ".layers.0." in name or ".layers.3." in name:
                assert torch.equal(after[name], tensor), name
            elif ".mlp." in name and method == "llm-pruner":  # the others may spare a block
                assert after[name].shape != tensor.shape, name
        AutoModelForCausalLM.from_pretrained(tmp_path / method)
    with pytest.raises(RecipeError, match="leave some of the 4 blocks"):
        prune(model, tmp_path / "none", options={"protect_first": 0.5, "protect_last": 0.5})


def test_least_squares_after_a_protected_block(model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out", method="llm-pruner", options={"compensate": "least_squares"})
    assert len({row.block for row in report.layers}) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_dead_units_go_first_and_nothing_changes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    dense = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in dense.model.layers:
            for tensor in (
                layer.mlp.gate_proj.weight,
                layer.mlp.up_proj.weight,
                layer.mlp.down_proj.weight.T,
            ):
                tensor[10:34] = 0
    dense.save_pretrained(model)
    share = 24 * 3 * 64 / _sizes(model)[0]
    plain = {"protect_first": 0, "protect_last": 0, "targets": "ffn"}
    for order in ("first", "second", "mixed", "vector"):
        out = tmp_path / order
        prune(model, out, method="llm-pruner", sparsity=share, options={**plain, "order": order})
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        assert loaded.config.intermediate_size == 72
        torch.testing.assert_close(loaded(IDS).logits, dense.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_saved_taylor_scores_plan_other_ratios(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "first", method="llm-pruner", sparsity=0.2, options={"order": "second"})
    scores = str(tmp_path / "first" / "scores.safetensors")
    changed = {"order": "second", "spread": "global"}
    prune(model, tmp_path / "again", method="llm-pruner", options=changed, scores=scores)
    prune(model, tmp_path / "fresh", method="llm-pruner", options=changed)
    assert same_bytes(tmp_path / "again", tmp_path / "fresh", "scores.safetensors")
    with pytest.raises(InputError, match=r"no 0\.|scores of options"):
        prune(
            model,
            tmp_path / "out",
            method="llm-pruner",
            options={**changed, "protect_first": 0},
            scores=scores,
        )
    assert LlmPruner().protect_first == 0.125


def test_bad_requests_are_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.safetensors").write_bytes(b"")
    for settings, reason in (
        ({"scores": str(tmp_path / "scores.safetensors")}, "leave --scores out"),
        ({"sparsity": 0.99}, "at most"),
        ({"sparsity": 0.02, "options": {"targets": "heads"}}, "whole heads make"),
        ({"options": {"compensate": "bias"}}, "compensate"),
    ):
        with pytest.raises(RecipeError, match=reason):
            prune(model, tmp_path / "out", **settings)
    one_norm = save_tiny("olmo2", tmp_path / "olmo2")
    with pytest.raises(AnatomyError, match="targets=ffn"):
        prune(one_norm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
