"""Methods that look at no text get none, and policies go from run to run and from model to model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import IDS
from safetensors.torch import load_file
from small_runs import interrupted, same_bytes, text_beside
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy.resolve import resolve
from secateur.checkpoint.reader import Checkpoint
from secateur.cli.app import run
from secateur.core.errors import CalibrationError, InputError
from secateur.pipeline.opened import open_model
from secateur.pipeline.plans.draft import groups_of
from secateur.pipeline.ways.unit_weights import UnitWeights
from secateur.report.model import Report
from secateur.structure.prunenet import PruneNet

NOWHERE = {"source": "nowhere.txt", "samples": 6, "length": 24}
QUICK = {"episodes": 2, "samples": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("free") / "model", num_hidden_layers=3)


def prune(model: Path, out: Path, **settings: Any) -> Report:
    quiet = {"evaluation_windows": 0, "measure_speed": False, "sparsity": 0.2, "calibration": NOWHERE}
    settings = {**quiet, "method": "prunenet", **settings}
    if settings["method"] == "prunenet":
        settings["options"] = {**QUICK, **settings.get("options", {})}
    return secateur.prune(model, out, **settings)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method", ["prunenet", "random-structure", "magnitude-structure", "magnitude", "random"]
)
def test_what_observes_nothing_reads_and_samples_nothing(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = prune(model, tmp_path / "out", method=method)
    assert report.calibration is None
    with monkeypatch.context() as patch:
        patch.setattr("secateur.calibration.windows.sample_windows", lambda *_, **__: pytest.fail("sampled"))
        prune(model, tmp_path / "self", method=method, calibration={"source": "self"})
    assert weights(tmp_path / "self") == weights(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("wanda-structure", {}),
        ("magnitude-structure", {"options": {"compensate": "least_squares"}}),
        ("magnitude-structure", {"options": {"spread": "sigmoid"}}),
        ("magnitude", {"allocation": "owl"}),
        ("shortgpt", {"sparsity": 0.34}),
        ("prunenet", {"evaluation_windows": 2}),
    ],
)
def test_what_observes_or_judges_asks_for_text(
    method: str, settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt"):
        prune(model, tmp_path / "out", method=method, **settings)
    assert not (tmp_path / "out").exists()


def test_text_of_its_own_judges_without_calibration(model: Path, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "out", text=text_beside(model), evaluation_windows=2)
    assert report.perplexity_after is not None
    assert report.calibration is None


def test_all_methods_are_judged_on_the_same_windows(model: Path, tmp_path: Path) -> None:
    calibration = {**NOWHERE, "source": text_beside(model)}
    found = [
        prune(model, tmp_path / method, method=method, calibration=calibration, evaluation_windows=2)
        for method in ("random-structure", "wanda-structure")
    ]
    assert found[0].protocol == found[1].protocol
    assert found[0].perplexity_before == found[1].perplexity_before
    assert found[0].calibration is None
    assert found[1].calibration is not None


def test_one_policy_serves_other_ratios_and_models(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "first")
    policy = str(tmp_path / "first" / "policy.safetensors")
    prune(model, tmp_path / "more", sparsity=0.3)
    prune(model, tmp_path / "reused", sparsity=0.3, options={"policy": policy})
    assert weights(tmp_path / "reused") == weights(tmp_path / "more")
    assert not (tmp_path / "reused" / "policy.safetensors").exists()
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=2, seed=1)
    prune(other, tmp_path / "moved", options={"policy": policy})
    AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    moved, own = (load_file(tmp_path / name / "scores.safetensors")["0.ffn"] for name in ("moved", "first"))
    assert not torch.equal(moved, own), "the same policy, other weights"


def test_a_policy_of_another_width_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(model, tmp_path / "first")
    policy = tmp_path / "first" / "policy.safetensors"
    wide = save_tiny("llama", tmp_path / "wide", hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    out = tmp_path / "out"
    command = ["prune", str(wide), "-o", str(out), "--method", "prunenet", "--sparsity", "0.2"]
    assert run([*command, "-O", f"policy={policy}", "--evaluation-windows", "0"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "64" in error
    assert "96" in error
    assert not out.exists()
    with pytest.raises(InputError, match="targets"):
        prune(model, out, options={"targets": "heads"})


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_the_result_is_the_stock_class_and_the_silenced_model(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    prune(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    scores = load_file(tmp_path / "out" / "scores.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pairs = zip(resolve(dense.config).blocks, resolve(small.config).blocks, strict=True)
    for block, cut in pairs:
        (units,), (left,) = PruneNet().units(block), PruneNet().units(cut)
        gone = scores[f"{block.index}.{units.kind}"].argsort(stable=True)[: units.count - left.count]
        assert len(gone)
        with torch.no_grad():
            units.writer.view(dict(dense.get_submodule(block.prefix).state_dict()))[:, gone] = 0
    torch.testing.assert_close(small(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_learns_once_and_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(model, tmp_path / "whole")
    with interrupted(after=1):
        prune(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PruneNet, "prepare", lambda *_: pytest.fail("learned again"))
        prune(model, tmp_path / "out", resume=True)
    assert same_bytes(tmp_path / "out", tmp_path / "whole", "scores.safetensors", "policy.safetensors")
    with (tmp_path / "whole" / "policy.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert json.loads(header["__metadata__"]["options"])["episodes"] == 2


def test_weights_come_back_the_same_whether_they_are_kept_or_read_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read, names = open_model(model), Checkpoint.read, list[str]()

    def noted(self: Checkpoint, wanted: Any) -> Any:
        names.extend(wanted)
        return read(self, wanted)

    monkeypatch.setattr(Checkpoint, "read", noted)
    kept = UnitWeights(opened, groups_of(opened, PruneNet()), 0, torch.device("cpu"))
    first = [problem.weight for problem in kept]
    assert len(names) == 3 * len(kept) == 9
    assert all(".mlp." in name for name in names)
    again = [problem.weight for problem in kept]
    assert len(names) == 9
    monkeypatch.setattr("secateur.pipeline.ways.unit_weights.MEMORY_FRACTION", 0)
    anew = UnitWeights(opened, groups_of(opened, PruneNet()), 0, torch.device("cpu"))
    for _ in range(2):
        for one, other, third in zip(first, again, anew, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third.weight)
    assert len(names) == 27
