"""Budgets, plans and the nearest uniform plan, on files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from small_runs import interrupted, same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.cli.app import run
from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import SILENT
from secateur.pipeline.opened import open_model
from secateur.pipeline.plans import decode_costs
from secateur.pipeline.plans.decode_costs import DecodeTable, rising
from secateur.pipeline.plans.draft import groups_of
from secateur.pipeline.ways import structure
from secateur.structure.wanda_structure import WandaStructure

prune = partial(small_runs.prune, calibration={"samples": 4}, evaluation_windows=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return save_tiny("llama", folder, num_hidden_layers=3, dtype=torch.bfloat16)


@pytest.mark.parametrize("spread", ["uniform", "global", "knapsack"])
@pytest.mark.parametrize("kind", ["parameters", "bytes"])
def test_a_size_counts_the_whole_files_and_is_never_exceeded(
    kind: str, spread: str, model: Path, tmp_path: Path
) -> None:
    dense = open_model(model).checkpoint
    limit = int(0.8 * (dense.nbytes if kind == "bytes" else dense.parameters))
    options = {"spread": spread, "compensate": "bias"}  # added biases count too
    report = prune(
        model, tmp_path / "out", method="wanda-structure", budget=f"{kind}={limit}", options=options
    )
    after = open_model(tmp_path / "out").checkpoint
    size = after.nbytes if kind == "bytes" else after.parameters
    assert 0.97 * limit < size <= limit
    assert report.budget == f"{kind}={limit}"
    assert report.structure is not None
    assert report.structure.budget is not None
    assert report.structure.budget.planned == size
    assert report.sparsity_requested == pytest.approx(report.sparsity)


def test_what_is_reported_is_what_the_files_hold(model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out", method="wanda-structure", sparsity=0.3)
    facts, loaded = report.structure, AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert facts is not None
    config = loaded.config
    layers, hidden, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    ends = 2 * vocab * hidden
    assert facts.non_embedding_parameters_after == sum(p.numel() for p in loaded.parameters()) - ends
    norms = (2 * layers + 1) * hidden
    assert facts.macs_per_token_after == facts.non_embedding_parameters_after - norms + vocab * hidden
    assert facts.kv_bytes_per_token_after == 2 * 2 * layers * config.num_key_value_heads * config.head_dim
    assert facts.units_after == {
        "ffn": layers * config.intermediate_size,
        "kv_groups": layers * config.num_key_value_heads,
    }
    assert facts.stock
    assert facts.uniform is None
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Cache a token" in html
    assert f"{facts.macs_per_token_after:,}" in html


def test_unequal_plans_report_the_nearest_uniform_one_and_make_it(model: Path, tmp_path: Path) -> None:
    first = prune(model, tmp_path / "first", method="flap", sparsity=0.35, options={"compensate": "none"})
    assert first.structure is not None
    near = first.structure.uniform
    assert near is not None
    assert near.extra_loss > 0
    assert any("-O uniform=true" in warning for warning in first.warnings)
    scores = str(tmp_path / "first" / "scores.safetensors")
    options = {"compensate": "none", "uniform": True}
    report = prune(model, tmp_path / "equal", method="flap", sparsity=0.35, options=options, scores=scores)
    assert (report.parameters_after, report.bytes_after) == (near.parameters, near.bytes)
    assert near.parameters <= first.parameters_after
    config = json.loads((tmp_path / "equal" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["intermediate_size"] == near.units_a_block["ffn"]
    assert config["num_key_value_heads"] == near.units_a_block["kv_groups"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "equal")


@pytest.mark.parametrize("compensate", ["none", "bias", "least_squares"])
def test_a_plan_makes_the_same_files_again(compensate: str, model: Path, tmp_path: Path) -> None:
    options = {"compensate": compensate}
    made = prune(model, tmp_path / "made", method="flap", sparsity=0.3, options=options)
    plan = tmp_path / "made" / "plan.json"
    again = prune(model, tmp_path / "again", plan=str(plan))
    assert same_bytes(tmp_path / "made", tmp_path / "again", "plan.json")
    assert (again.method, again.options) == ("flap", made.options)
    assert again.sparsity_requested == 0.3
    assert not (tmp_path / "again" / "scores.safetensors").exists()


def test_plans_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "made", method="wanda-structure", sparsity=0.3)
    plan = tmp_path / "made" / "plan.json"
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=3, seed=1)
    with pytest.raises(InputError, match="plan for model"):
        prune(other, tmp_path / "out", plan=str(plan))
    with pytest.raises(RecipeError, match="leave --sparsity out"):
        prune(model, tmp_path / "out", plan=str(plan), sparsity=0.3)
    with pytest.raises(RecipeError, match="leave --method out"):
        prune(model, tmp_path / "out", plan=str(plan), method="flap")
    values = json.loads(plan.read_text())
    for bad, message in (
        ([{"ffn": [], "kv_groups": [0]}] * 3, "nothing"),
        ([{"ffn": [0, 0], "kv_groups": [0]}] * 3, "twice"),
        ([{"ffn": [0, 96], "kv_groups": [0]}] * 3, "below 96"),
        ([{"ffn": [0]}] * 3, "other kinds"),
        ([{"ffn": [0], "kv_groups": [0]}] * 2, "other kinds"),
    ):
        damaged = tmp_path / "damaged.json"
        damaged.write_text(json.dumps({**values, "blocks": bad}))
        with pytest.raises(InputError, match=message):
            prune(model, tmp_path / "out", plan=str(damaged))
    damaged.write_text("{}")
    with pytest.raises(InputError, match="is no plan"):
        prune(model, tmp_path / "out", plan=str(damaged))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--budget", "parameters=10k"], ["at least", "outside the blocks"]),
        (["--budget", "parameters=9M"], ["less than the dense model"]),
        (["--budget", "paramters=1M"], ["did you mean 'parameters'"]),
        (["--budget", "bytes=0.8x", "--sparsity", "0.5"], ["sparsity and budget", "one of them"]),
        (["--method", "wanda", "--budget", "bytes=0.8x"], ["structured method"]),
        (["--method", "shortgpt", "--budget", "bytes=0.8x"], ["give --sparsity"]),
        (["--plan", "nowhere.json"], ["nowhere.json", "cannot be read"]),
    ],
)
def test_bad_budgets_are_one_line(
    more: list[str],
    fragments: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method = [] if "--method" in more else ["--method", "flap"]
    command = [
        "prune",
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        text_beside(model),
        "--length",
        "24",
    ]
    assert run([*command, *method, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for fragment in fragments:
        assert fragment in error
    assert not (tmp_path / "out").exists()


def test_floors_that_were_reached_are_named(model: Path, tmp_path: Path) -> None:
    options = {"targets": "heads", "spread": "global"}
    sizes = open_model(model).anatomy.blocks
    group = next(units for _, units in groups_of(open_model(model), WandaStructure()) if units.kind != "ffn")
    sparsity = 3 * group.parameters / sum(block.size for block in sizes)
    report = prune(model, tmp_path / "out", method="magnitude-structure", sparsity=sparsity, options=options)
    assert report.structure is not None
    assert report.structure.floors == ["0.kv_groups", "1.kv_groups", "2.kv_groups"]
    assert all("min_keep" in layer.fallbacks[0] for layer in report.layers)


def test_plan_shows_every_block_of_saved_scores(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(model, tmp_path / "made", method="flap", sparsity=0.3)
    scores = str(tmp_path / "made" / "scores.safetensors")
    facts = secateur.plan(model, method="flap", sparsity=0.3, scores=scores)
    assert facts["parameters_after"] == report.parameters_after
    assert facts["bytes_after"] == report.bytes_after
    assert report.structure is not None
    assert facts["structure"]["kv_bytes_per_token_after"] == report.structure.kv_bytes_per_token_after
    kept = json.loads((tmp_path / "made" / "plan.json").read_text())["blocks"]
    widths = [{kind: width for kind, (width, _) in block.items()} for block in facts["blocks"]]
    assert widths == [{kind: len(units) for kind, units in block.items()} for block in kept]
    assert run(["plan", str(model), "--plan", str(tmp_path / "made" / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert f"{len(kept[1]['ffn'])}/96" in shown
    assert "░" in shown
    assert "blocks" not in secateur.plan(model, method="flap", sparsity=0.3)


TABLE = DecodeTable(
    10.0, {"kv_groups": [(0.5, 0.9)], "ffn": [(0.75, 0.9), (0.5, 0.8), (0.25, 0.7), (0.0, 0.6)]}
)


def test_measured_costs_add_up_to_the_dense_step(model: Path) -> None:
    opened = open_model(model)
    groups = groups_of(opened, WandaStructure())
    goal = TABLE.goal(groups, 8.0)
    whole = [units.count for _, units in groups]
    assert goal.cost(whole) == pytest.approx(10.0)
    half = [units.count // 2 if units.kind == "ffn" else units.count for _, units in groups]
    assert goal.cost(half) == pytest.approx(8.0)
    half_heads = [units.count if units.kind == "ffn" else units.count // 2 for _, units in groups]
    assert goal.cost(half_heads) == pytest.approx(9.0)
    assert all((costs.diff() >= 0).all() for costs in goal.costs)


def test_noise_is_bent_straight() -> None:
    assert rising([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_a_killed_run_keeps_the_costs_it_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "wanda-structure", "budget": "decode=0.8x", "options": {"spread": "knapsack"}}
    tables = iter([TABLE, TABLE])
    monkeypatch.setattr(structure, "measure_decode", lambda *_: next(tables))
    report = prune(model, tmp_path / "whole", **settings)
    assert report.structure is not None
    assert report.structure.budget is not None
    assert 7.5 < report.structure.budget.planned <= 8.0
    with interrupted(after=0):
        prune(model, tmp_path / "out", **settings)
    prune(model, tmp_path / "out", resume=True, **settings)  # a third measurement would fail
    assert same_bytes(tmp_path / "whole", tmp_path / "out", "plan.json", "scores.safetensors")


def test_a_time_out_of_reach_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "measure_decode", lambda *_: TABLE)
    with pytest.raises(RecipeError, match="at least"):
        prune(model, tmp_path / "out", method="wanda-structure", budget="decode=2ms")
    assert not (tmp_path / "out").exists()


def test_widths_are_really_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_costs, "REPEATS", 1)
    opened = open_model(model)
    method = WandaStructure()
    cpu = torch.device("cpu")
    table = decode_costs.measure_decode(
        opened, method, groups_of(opened, method), [], cpu, torch.float32, SILENT
    )
    assert table.milliseconds > 0
    assert [share for share, _ in table.points["kv_groups"]] == [0.5]
    assert [share for share, _ in table.points["ffn"]] == [0.75, 0.5, pytest.approx(1 / 96)]
    assert DecodeTable.load(_saved(table, opened.folder.parent / "decode.json")).points.keys() == {
        "kv_groups",
        "ffn",
    }


def _saved(table: DecodeTable, path: Path) -> Path:
    table.save(path)
    return path
