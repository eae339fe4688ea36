"""Recovery on files: same names, shapes and zeros, better on text kept back, resumable, refused in time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from elsewhere import dies, loaded_elsewhere
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_tokenizer

import secateur
from secateur.cli.app import run
from secateur.core.errors import AnatomyError, CalibrationError, RecipeError, ResumeError
from secateur.pipeline.mending import training
from secateur.pipeline.mending.training import STATE
from secateur.recovery.trainer import Trainer
from secateur.report.html import render
from secateur.report.model import Report

LINES = [
    "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n",
    "Nobody knew how many leaves the small tree had lost in the winter.\n",
    "She said: what you take away is as much a part of the garden.\n",
]
TEXT = "".join(LINES[index % 3 if index % 7 else 0] for index in range(400))
SMALL: dict[str, Any] = {
    "tokens": 300, "length": 16, "batch_size": 4, "validation_windows": 4, "evaluation_windows": 4,
}  # fmt: skip
VOLATILE = {"report.json", "report.html", "README.md"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A dense model, and what pruning makes of it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny("llama", folder / "dense", num_hidden_layers=3, dtype=torch.bfloat16)
    given = {"calibration": {"source": str(text), "samples": 6, "length": 24}, "measure_speed": False}
    settings: dict[str, Any] = {**given, "evaluation_windows": 2}
    for name, own in {
        "masked": {"method": "wanda", "sparsity": 0.5},
        "grouped": {"method": "wanda", "pattern": "2:4"},
        "uneven": {"method": "flap", "sparsity": 0.3},
        "cfsp": {"method": "cfsp", "sparsity": 0.2},
        "shallow": {"method": "shortgpt", "sparsity": 0.33},
    }.items():
        secateur.prune(folder / "dense", folder / name, **settings, **own)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) if "scores" not in path.name
            for name, t in load_file(path).items()}  # fmt: skip


def bits(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in VOLATILE]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("masked", "lora"), ("masked", "full"), ("masked", "refit"), ("grouped", "lora"), ("uneven", "lora"),
        ("uneven", "refit"), ("shallow", "full"),
    ],
)  # fmt: skip
def test_names_shapes_dtypes_and_zeros_stay(
    name: str, how: str, models: Path, text: Path, tmp_path: Path
) -> None:
    rate = {} if how == "refit" else {"learning_rate": 0.01, "options": {"kl_weight": 0}}  # a random teacher
    report = secateur.recover(
        models / name, tmp_path / "out", text=text, how=how, teacher=str(models / "dense"), **SMALL, **rate
    )
    old, new = weights(models / name), weights(tmp_path / "out")
    assert list(new) == list(old)
    changed = 0
    for key, before in old.items():
        after = new[key]
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        if "proj.weight" in key and (before == 0).any():
            assert torch.equal(after == 0, before == 0) or not (after[before == 0] != 0).any()
        changed += not torch.equal(before, after)
    assert changed > 2
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    companions = {path.name for path in (models / name).iterdir()} - {"scores.safetensors", "plan.json"}
    assert companions <= {path.name for path in (tmp_path / "out").iterdir()}
    stages = [stage.method for stage in report.stages]
    assert stages == [Report.load(models / name).method, how]
    assert report.recovery is not None
    assert report.perplexity_before != report.recovery.perplexity_given
    assert "Perplexity, pruned and then mended" in render(report)


def test_it_loads_in_a_fresh_process_without_secateur(models: Path, text: Path, tmp_path: Path) -> None:
    report = secateur.recover(models / "uneven", tmp_path / "out", text=text, learning_rate=0.01, **SMALL)
    assert loaded_elsewhere(tmp_path / "out", "remote").parameters == report.parameters_after


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"learning_rate": 0.0}])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_nothing_learnt_is_nothing_changed(
    how: str, changes: dict[str, Any], models: Path, text: Path, tmp_path: Path
) -> None:
    report = secateur.recover(models / "masked", tmp_path / "out", text=text, how=how, **{**SMALL, **changes})
    assert bits(tmp_path / "out")["model.safetensors"] == bits(models / "masked")["model.safetensors"]
    assert report.perplexity_before == report.perplexity_after


def test_a_killed_run_ends_in_the_same_bytes(models: Path, text: Path, tmp_path: Path) -> None:
    def arguments(out: Path, *more: str) -> list[str]:
        return [
            "recover", str(models / "masked"), "-o", str(out), "--text", str(text), "--tokens", "300",
            "--length", "16", "--batch-size", "4", "--validation-windows", "4", "--evaluation-windows", "4",
            "--learning-rate", "0.01", "-O", "checkpoint_seconds=0", *more,
        ]  # fmt: skip

    assert run(arguments(tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    dies("secateur.recovery.trainer:Trainer._step", 4, run, arguments(out))
    assert (out / ".secateur" / "scratch" / STATE).exists()
    assert not (out / "config.json").exists()
    assert run(arguments(out)) == 2
    assert run(arguments(out, "--resume", "--seed", "1")) == 2
    assert run(arguments(out, "--resume")) == 0
    assert bits(out) == bits(tmp_path / "whole")
    assert not (out / ".secateur").exists()


def test_a_refit_goes_on_behind_the_blocks_that_are_done(
    models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"text": text, "how": "refit", "teacher": str(models / "dense"), **SMALL}
    secateur.recover(models / "uneven", tmp_path / "whole", **given)

    def interrupted(job: Any, method: Any, student: Any, *rest: Any) -> Any:
        if student.index == 2:
            raise KeyboardInterrupt
        return refit(job, method, student, *rest)

    refit = training._refit_one
    with monkeypatch.context() as patch:
        patch.setattr(training, "_refit_one", interrupted)
        with pytest.raises(KeyboardInterrupt):
            secateur.recover(models / "uneven", tmp_path / "out", **given)
    report = secateur.recover(models / "uneven", tmp_path / "out", resume=True, **given)
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert len(report.layers) == 6
    assert all(row.loss < row.notes["loss_before"] or row.fallbacks for row in report.layers)  # type: ignore[operator]


def test_another_request_does_not_resume(
    models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            secateur.recover(models / "masked", tmp_path / "out", text=text, **SMALL)
    with pytest.raises(ResumeError, match=r"recover\.rank"):
        secateur.recover(models / "masked", tmp_path / "out", text=text, resume=True, rank=2, **SMALL)


def test_no_window_is_both_learnt_from_and_judged_by(
    models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def looked(job: Any, data: Any, writer: Any) -> Any:
        seen["data"] = data
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.pipeline.mending.recover.mend", looked)
    with pytest.raises(KeyboardInterrupt):
        secateur.recover(models / "masked", tmp_path / "out", text=text, **SMALL)
    data = seen["data"]
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    parts = [data.run.evaluation.ids, data.training.ids, data.validation.ids]
    read = torch.cat([part.flatten() for part in parts]).tolist()
    assert read == ids[16 : 16 + len(read)]
    assert [len(part) for part in parts] == [4, 19, 4]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"length": 300}, CalibrationError, "at most 256"),
        ({"how": "refit"}, RecipeError, "--teacher"),
        ({"teacher": "seedling"}, RecipeError, "vocabulary"),
        ({"options": {"rank_from": "importance"}}, RecipeError, "turns"),
        ({"options": {"ranc": 3}}, RecipeError, "did you mean 'rank'"),
        ({"wrong": 1}, RecipeError, "wrong"),
        ({"batch_size": 0}, RecipeError, "batch_size"),
    ],
)
def test_bad_requests_write_nothing(
    changes: dict[str, Any], error: type[Exception], says: str, models: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        secateur.recover(models / "masked", tmp_path / "out", text=text, **{**SMALL, **changes})
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:400], encoding="utf-8")
    command = ["recover", str(models / "masked"), "-o", str(tmp_path / "out"), "--text", str(short)]
    assert run([*command, "--length", "32", "--evaluation-windows", "1"]) == 2
    assert "to validate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refit_refuses_blocks_that_do_not_simply_add(text: Path, tmp_path: Path) -> None:
    model = save_tiny("gemma2", tmp_path / "model")
    with pytest.raises(AnatomyError, match="do not simply add"):
        secateur.recover(model, tmp_path / "out", text=text, how="refit", teacher=str(model), **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_for_the_memory_is_refused(
    models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "available_memory_bytes", lambda: 1000)
    with pytest.raises(secateur.InputError, match=r"--how refit.*--how lora"):
        secateur.recover(models / "masked", tmp_path / "out", text=text, how="full", **SMALL)


def test_hidden_states_of_a_shallower_model_are_matched_by_its_report(
    models: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    made = training.Teacher
    monkeypatch.setattr(
        training, "Teacher", lambda model, blocks=(): seen.append(blocks) or made(model, blocks)
    )
    rows = Report.load(models / "shallow").layers
    gone = next(row.block for row in rows if row.sparsity == 1)
    given: dict[str, Any] = {"text": text, "teacher": str(models / "dense"), "options": {"hidden": "cosine"}}
    secateur.recover(models / "shallow", tmp_path / "out", **given, **SMALL)
    assert [block.self_attn.layer_idx for block in seen[0]] == [i for i in range(3) if i != gone]


def test_ranks_from_the_importance_that_pruning_left(models: Path, text: Path, tmp_path: Path) -> None:
    options = {"rank_from": "importance"}
    report = secateur.recover(models / "cfsp", tmp_path / "out", text=text, options=options, **SMALL)
    plain = secateur.recover(models / "cfsp", tmp_path / "plain", text=text, **SMALL)
    assert report.recovery is not None
    assert plain.recovery is not None
    assert report.recovery.trained_parameters == pytest.approx(plain.recovery.trained_parameters, rel=0.1)
    assert bits(tmp_path / "out") != bits(tmp_path / "plain")


def test_a_chain_prunes_trains_and_prunes(models: Path, text: Path, tmp_path: Path) -> None:
    common = {"how": "full", "text": str(text), "tokens": 200, "length": 16, "batch_size": 4,
              "validation_windows": 4, "learning_rate": 0.01}  # fmt: skip
    values = {
        "model": str(models / "dense"),
        "calibration": {"source": str(text), "samples": 6, "length": 24},
        "evaluation_windows": 2,
        "measure_speed": False,
        "stages": [
            {"method": "flap", "sparsity": 0.1},
            {"recover": {**common, "options": {"kl_weight": 0, "schedule": "wsd", "schedule_end": 0.5}}},
            {"method": "wanda", "sparsity": 0.5},
            {"recover": {**common, "options": {"kl_weight": 0, "schedule": "wsd", "schedule_start": 0.5}}},
        ],
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    out = tmp_path / "out"
    assert run(["prune", "--recipe", str(recipe), "-o", str(out), "--seed", "2"]) == 0
    report = Report.load(out)
    assert [stage.method for stage in report.stages] == ["flap", "full", "wanda", "full"]
    assert report.model == str(models / "dense")
    assert report.recovery is not None
    assert report.recovery.teacher == str(models / "dense")
    assert report.recovery.looks[-1].learning_rate == pytest.approx(0.00625)  # of one curve, near its end
    assert report.seed == 2
    path = next(out.glob("model*.safetensors"))
    with safe_open(path, "pt") as file:
        zeros = float((file.get_tensor("model.layers.0.mlp.up_proj.weight") == 0).float().mean())
    assert zeros >= 0.4
    assert not (tmp_path / "out.stages").exists()
    values["stages"] = [{"recover": {**common, "txt": "x"}}]
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert run(["prune", "--recipe", str(recipe), "-o", str(tmp_path / "other")]) == 2


def test_a_pruned_seedling_gets_better(tmp_path: Path) -> None:
    samples = {"samples": 16, "length": 64}
    secateur.prune(
        "seedling", tmp_path / "pruned", method="flap", sparsity=0.3, calibration=samples,
        evaluation_windows=0, measure_speed=False,
    )  # fmt: skip
    report = secateur.recover(
        tmp_path / "pruned", tmp_path / "out", text="self", teacher="seedling", tokens=8000, length=64,
        batch_size=8, learning_rate=5e-3, evaluation_windows=16, validation_windows=8,
    )  # fmt: skip
    assert report.recovery is not None
    assert report.perplexity_after < 0.95 * report.recovery.perplexity_given  # type: ignore[operator]
    assert report.recovery.looks[-1].loss < report.recovery.looks[1].loss  # type: ignore[operator]
