"""Chains: stages on top of each other, judged against the dense model, resumable."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_runs import text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from secateur.cli.app import run
from secateur.core.errors import OutputError, RecipeError, ResumeError
from secateur.pipeline import chain
from secateur.pipeline.chain import prune_chain
from secateur.recipe import Recipe, RecoveryRecipe, read_recipe
from secateur.report.model import Report


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    values = {
        "model": str(model),
        "calibration": {"source": text_beside(model), "samples": 6, "length": 24},
        "evaluation_windows": 2,
        "measure_speed": False,
        "stages": [{"method": "flap", "sparsity": 0.2}, {"method": "wanda", "sparsity": 0.5}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_stages_follow_each_other_and_the_dense_model_is_the_judge(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["prune", "--recipe", str(recipe), "-o", str(out)]) == 0
    report = Report.load(out)
    assert [stage.method for stage in report.stages] == ["flap", "wanda"]
    assert report.model == str(tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert report.parameters_before == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == report.stages[0].parameters_after < report.parameters_before
    pruned = AutoModelForCausalLM.from_pretrained(out)
    zeros = sum(int((p == 0).sum()) for name, p in pruned.named_parameters() if name.endswith("proj.weight"))
    assert zeros > 0.4 * report.parameters_after * 0.3
    assert not (tmp_path / "out.stages").exists()


def test_a_chain_goes_on_in_the_stage_that_was_interrupted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, out, stage, seen = read_recipe(recipe), tmp_path / "out", chain.prune_checkpoint, []

    def counted(own: Recipe, *rest: object, **more: object) -> object:
        seen.append(own.method)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stage(own, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(chain, "prune_checkpoint", counted)
    with pytest.raises(KeyboardInterrupt):
        prune_chain(recipes, out)
    with pytest.raises(OutputError, match="add --resume"):
        prune_chain(recipes, out)
    with pytest.raises(ResumeError, match="other stages"):
        prune_chain(recipes[::-1], out, resume=True)
    report = prune_chain(recipes, out, resume=True)
    assert report is not None
    assert seen == ["flap", "wanda", "wanda"]
    assert [found.method for found in report.stages] == ["flap", "wanda"]


def test_a_chain_killed_after_its_last_stage_only_tidies_up(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    recipes, out = read_recipe(recipe), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(chain, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_chain(recipes, out)
    weights = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(chain, "prune_checkpoint", None)
    report = prune_chain(recipes, out, resume=True)
    assert report is not None
    assert [stage.method for stage in report.stages] == ["flap", "wanda"]
    assert (out / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "out.stages").exists()


def test_stages_run_in_one_process(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="torchrun"):
        prune_chain(read_recipe(recipe), tmp_path / "out")
    assert not (tmp_path / "out.stages").exists()


def test_the_command_line_wins_over_the_file_setting_by_setting(recipe: Path) -> None:
    stages = read_recipe(recipe, seed=7, calibration={"length": 12})
    assert [stage.seed for stage in stages] == [7, 7]
    assert [(stage.calibration.samples, stage.calibration.length) for stage in stages] == [(6, 12), (6, 12)]


@pytest.mark.parametrize("stages", [[], {"method": "wanda"}, [{"model": "other", "method": "x"}] * 2, [3]])
def test_wrong_stages_are_refused(stages: object, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "stages": stages}), encoding="utf-8")
    with pytest.raises(RecipeError):
        read_recipe(path)


def test_turns_become_stages_with_one_curve_and_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "turns.yaml"
    path.write_text(
        "model: seedling\n"
        "interleave:\n"
        "  turns: 4\n"
        "  sparsity: 0.4\n"
        "  prune: {method: adapt-pruner}\n"
        "  recover: {how: full, text: words.txt, tokens: 1000, skip: 50}\n"
    )
    stages = read_recipe(path)
    pruned = [stage for stage in stages if isinstance(stage, Recipe)]
    trained = [stage.recover for stage in stages if isinstance(stage, RecoveryRecipe)]
    assert [isinstance(stage, Recipe) for stage in stages] == [True, False] * 4
    left = 1.0
    for stage in pruned:
        left *= 1 - stage.resolved_sparsity
    assert left == pytest.approx(0.6)
    assert [part.tokens for part in trained] == [100, 200, 300, 400]
    assert [part.skip for part in trained] == [50, 150, 350, 650]
    curve = [(part.options["schedule_start"], part.options["schedule_end"]) for part in trained]
    assert curve == [(0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)]
    assert {part.options["schedule"] for part in trained} == {"wsd"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interleave: {turns: 1, sparsity: 0.4, prune: {}, recover: {text: a}}", "interleave"),
        ("interleave: {turns: 2, sparsity: 0.4, prune: {}, recover: {text: a}}\nstages: []", "one of them"),
        ("interleave: {turn: 2, sparsity: 0.4, prune: {}, recover: {text: a}}", "turns"),
    ],
)
def test_turns_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "turns.yaml"
    path.write_text(f"model: seedling\n{text}\n")
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)
