"""Runs that search how many units go where: better than equal shares, resumable to the bit, honest."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import dies
from small_runs import same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.core.errors import AnatomyError, MissingExtraError, RecipeError
from secateur.pipeline.search import searching
from secateur.pipeline.search.supernet import Supernet
from secateur.report.model import Report

FAST = {"generations": 3, "iterations": 2, "offspring": 6, "tokens": [48, 144], "survivors": [2]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    return save_tiny("llama", folder / "model", num_hidden_layers=4, num_key_value_heads=4)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(model, out)
    return out


def settings(model: Path, options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    calibration = {"source": text_beside(model), "samples": 6, "length": 24}
    common = {"method": "tyr", "sparsity": 0.3, "evaluation_windows": 2}
    checks = {"measure_speed": False, "check_loading": False}
    return {**common, **checks, "calibration": calibration, "options": {**FAST, **(options or {})}, **changes}


def prune(model: Path, out: Path, resume: bool = False, **changes: Any) -> Report:
    report: Report = secateur.prune(model, out, resume=resume, **settings(model, **changes))
    return report


def removed(out: Path) -> dict[tuple[int, str], int]:
    rows = json.loads((out / "report.json").read_text())["layers"]
    return {(row["block"], row["matrix"]): round(row["sparsity"] * row["rows"]) for row in rows}


def record(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "search.json").read_text())["iterations"]
    return rows


def test_totals_of_each_kind_are_those_of_equal_shares(model: Path, whole: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "equal", options={"generations": 0})
    found, equal = removed(whole), removed(tmp_path / "equal")
    for kind in ("ffn", "kv_groups"):
        assert len({count for (_, own), count in equal.items() if own == kind}) == 1
        assert sum(n for (_, own), n in found.items() if own == kind) == sum(
            n for (_, own), n in equal.items() if own == kind
        )
    assert found != equal
    assert report.sparsity == pytest.approx(0.3, abs=0.01)
    rows = record(tmp_path / "equal")
    assert len(rows) == 1
    assert rows[0]["generations"] == []
    assert rows[0]["held_out"]["start"] == rows[0]["held_out"]["found"]


def test_the_record_says_what_was_done(model: Path, whole: Path) -> None:
    rows = record(whole)
    assert [len(row["generations"]) for row in rows] == [3, 3]
    assert [row["groups"][1]["step"] for row in rows] == [12, 6]
    found = {}
    for row in rows:
        assert row["levels"] == row["generations"][-1]["levels"]
        found = {
            (group["block"], group["kind"]): group["removed"] + level * group["step"]
            for group, level in zip(row["groups"], row["levels"], strict=True)
        }
    assert found == removed(whole)
    AutoModelForCausalLM.from_pretrained(whole)


def test_on_one_batch_the_best_so_far_only_improves(model: Path, tmp_path: Path) -> None:
    """All windows in the last stage: every generation is judged on the same text."""
    options = {"iterations": 1, "generations": 5, "tokens": [144], "survivors": []}
    prune(model, tmp_path / "out", options=options)
    (row,) = record(tmp_path / "out")
    fitness = [generation["fitness"] for generation in row["generations"]]
    assert fitness == sorted(fitness, reverse=True)
    assert fitness[-1] < fitness[0]


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_a_block_that_does_nothing_loses_most(fitness: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4, num_key_value_heads=4)
    dense = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight.mul_(1e-4)
        dense.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    dense.save_pretrained(model)
    options = {"generations": 12, "iterations": 1, "tokens": [144], "survivors": [], "offspring": 12}
    prune(model, tmp_path / "out", options={**options, "fitness": fitness})
    (row,) = record(tmp_path / "out")
    levels = dict(zip([(g["block"], g["kind"]) for g in row["groups"]], row["levels"], strict=True))
    if fitness == "kl":
        assert levels[1, "ffn"] == 4
        assert levels[1, "kv_groups"] == 2
    else:  # a random model predicts no text: others may go as gladly
        assert row["generations"][-1]["fitness"] < row["generations"][0]["fitness"]


@pytest.mark.slow
def test_on_a_trained_model_the_search_helps_on_text_it_never_saw(tmp_path: Path) -> None:
    secateur.prune(
        "seedling",
        tmp_path / "out",
        method="tyr",
        sparsity=0.5,
        options={"iterations": 1, "generations": 6, "offspring": 8, "tokens": [256, 1024], "survivors": [3]},
        calibration={"samples": 24, "length": 64},
        evaluation_windows=16,
        measure_speed=False,
    )
    (row,) = record(tmp_path / "out")
    assert row["held_out"]["found"] < 0.95 * row["held_out"]["start"]


@pytest.mark.parametrize("how", ["expected", "median", "none"])
def test_later_blocks_see_pruned_inputs(
    how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, Any] = {}
    save = Supernet.save

    def watching(self: Supernet, index: int, versions: Any) -> None:
        seen[index] = versions["ffn"][0].weight
        save(self, index, versions)

    monkeypatch.setattr(Supernet, "save", watching)
    prune(model, tmp_path / "out", options={"error_accumulation": how, "generations": 0})
    pruned = dict(seen)
    prune(model, tmp_path / "dense", options={"error_accumulation": "none", "generations": 0})
    assert torch.equal(pruned[0], seen[0])
    assert torch.equal(pruned[1], seen[1]) == (how == "none")


PLACES = [
    ("secateur.pipeline.search.supernet:Supernet.save", 3),
    ("secateur.pipeline.search.searching:Search._save", 5),  # in the second iteration
    ("secateur.pipeline.state:Run.keep", 2),
]


def test_a_search_that_was_killed_goes_on_to_the_same_bytes(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for place, number in PLACES:
        dies(place, number, secateur.prune, model, out, resume=True, **settings(model))
        assert not (out / "config.json").exists()
    prune(model, out, resume=True)
    assert same_bytes(out, whole, "search.json")
    assert not (out / ".secateur").exists()


def test_blocks_read_from_files_give_the_same(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "RESIDENT_FRACTION", 0.0)
    prune(model, tmp_path / "out")
    assert same_bytes(tmp_path / "out", whole, "search.json")


def test_workers_without_ray_are_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[ray\]'"):
        prune(model, tmp_path / "out", options={"workers": 2})
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
def test_workers_find_the_same(model: Path, whole: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "out", options={"workers": 2})
    assert same_bytes(tmp_path / "out", whole, "search.json")


def test_bad_requests_are_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="survivors of each stage but the last"):
        prune(model, out, options={"survivors": [4, 2]})
    with pytest.raises(RecipeError, match="leave --scores out"):
        prune(model, out, scores="scores.safetensors")
    with pytest.raises(RecipeError, match="at most"):
        prune(model, out, sparsity=0.99)
    with pytest.raises(RecipeError, match=r"tokens\.0"):
        prune(model, out, options={"tokens": [0, 4]})
    with pytest.raises(RecipeError, match="spread='global'"):
        prune(model, out, options={"spread": "global"})
    with pytest.raises(AnatomyError, match="targets=ffn"):
        prune(save_tiny("olmo2", tmp_path / "olmo2"), out, calibration={"source": "x.txt"})
    assert not out.exists()


def test_a_search_that_harms_says_so() -> None:
    search = object.__new__(searching.Search)
    search._method = type("Method", (), {"fitness": "kl"})()  # type: ignore[assignment]
    rows = [{"held_out": {"start": 0.2, "found": 0.1}}, {"held_out": {"start": 0.1, "found": 0.3}}]
    search.record = {"iterations": rows}
    assert "0.2 to 0.3" in search.warnings()[0]
    search.record = {"iterations": [rows[0], {"held_out": None}]}
    assert search.warnings() == []
