"""Runs that store weights in few bits: what is written is what was rounded, loads, and survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import IDS as ELSEWHERE
from elsewhere import loaded_elsewhere
from tiny_models import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.anatomy.resolve import resolve
from secateur.calibration.driver import Driver
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import load_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import CheckpointError, RecipeError
from secateur.experts.online import OnlinePlan
from secateur.pipeline.ways import quantised
from secateur.quantise.gptq import gptq, round_to_nearest
from secateur.report.model import Report
from secateur.weights.losses import reconstruction_loss

TEXT = "The gardener cut the old branches of the apple tree, and 12 new shoots came up.\n" * 100
IDS = torch.arange(5, 29).view(2, 12)
FEW = {"group_size": 32, "grid_steps": 5}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def prune(model: Path, out: Path, text: Path, *, method: str = "mc-moe", **settings: Any) -> Report:
    options = {**FEW, **settings.pop("options", {})}
    return secateur.prune(
        model,
        out,
        method=method,
        options=options,
        calibration={"source": str(text), "samples": 6, "length": 24},
        evaluation_windows=2,
        measure_speed=False,
        **settings,
    )


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", torch.float32),
        ("qwen3_moe", torch.bfloat16),
        ("deepseek_v3", torch.float16),
        ("gpt_oss", torch.bfloat16),
    ],
)
def test_files_hold_what_was_rounded_and_load(
    family: str, dtype: torch.dtype, text: Path, tmp_path: Path
) -> None:
    model, out = save_tiny(family, tmp_path / "model", dtype=dtype), tmp_path / "out"
    report = prune(model, out, text, options={"bits": 2.0})
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    dense = AutoModelForCausalLM.from_pretrained(model)
    bits = json.loads((out / "bits.json").read_text())["experts"]
    matrices = {f"{b.index}.{m.name}": (b, m) for b in resolve(dense.config).blocks for m in b.matrices}
    assert {f"{row.block}.{row.matrix}" for row in report.layers} == matrices.keys()
    for row in report.layers:
        _, matrix = matrices[f"{row.block}.{row.matrix}"]
        expected = 4 if matrix.expert is None else bits[str(row.block)][matrix.expert]
        assert row.notes["bits"] == expected
    for name, weight in before.read(before.tensors).items():
        info, new = after.tensors[name], after.read([name])[name]
        assert (info.shape, new.dtype) == (tuple(weight.shape), dtype)
        if not info.format:
            assert new.equal(weight), "router, norms, biases and embeddings stay as they are"
            continue
        stacked = info.format == "low-bit-stack"
        layouts = after.read_packed(name).parts["layout"].view(-1, 2)
        planes = new.mT if stacked else new[None]  # gpt_oss stores inputs before outputs
        for plane, (own, group) in zip(planes, layouts.tolist(), strict=True):
            rows = [row for part in plane.split(group, dim=1) for row in part]
            assert max(len(row.unique()) for row in rows) <= 2**own
        if stacked:
            index = name.split(".")[2]
            assert layouts[:, 0].tolist() == bits[index]
    formats = {info.format for info in after.tensors.values() if info.format}
    assert formats == ({"low-bit", "low-bit-stack"} if family == "gpt_oss" else {"low-bit"})
    assert report.parameters_after == report.parameters_before
    assert report.bytes_after == after.nbytes < 0.75 * report.bytes_before
    assert report.precision is not None
    assert report.precision.bits_experts == 2.0
    loaded = logits(out)
    assert torch.isfinite(loaded).all()
    assert not loaded.equal(logits(model))
    secateur.export(out, tmp_path / "dense", format="dense")
    assert logits(tmp_path / "dense").equal(loaded)
    if family == "gpt_oss":
        here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert loaded_elsewhere(out, "import").logits.equal(here(ELSEWHERE).logits)
        assert not Checkpoint.open(tmp_path / "dense").formats


def test_plain_rounding_is_written_to_the_bit(text: Path, tmp_path: Path) -> None:
    model, out = save_tiny("mixtral", tmp_path / "model"), tmp_path / "out"
    prune(model, out, text, method="uniform-bits", options={"bits": 2, "rounding": "nearest"})
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    weight = Checkpoint.open(model).read([name])[name]
    new = Checkpoint.open(out).read([name])[name]
    assert new.equal(round_to_nearest(weight, 2, group=32, steps=5).weight)


@pytest.mark.parametrize(
    ("family", "name"), [("gpt_oss", "mlp.experts.down_proj"), ("gpt2", "mlp.c_fc.weight")]
)
def test_what_is_stored_transposed_is_rounded_along_its_inputs(
    family: str, name: str, text: Path, tmp_path: Path
) -> None:
    model, out = save_tiny(family, tmp_path / "model"), tmp_path / "out"
    prune(model, out, text, method="uniform-bits", options={"bits": 2, "rounding": "nearest"})
    stored = next(full for full in Checkpoint.open(model).tensors if full.endswith(f"1.{name}"))
    dense, new = (Checkpoint.open(folder).read([stored])[stored] for folder in (model, out))
    planes = dense.mT if dense.dim() == 3 else dense.T[None]
    expected = torch.stack([round_to_nearest(plane, 2, group=32, steps=5).weight.T for plane in planes])
    assert new.equal(expected.view_as(dense))
    assert torch.isfinite(logits(out)).all()


def test_a_model_without_experts_is_rounded_everywhere_and_better_with_gptq(
    text: Path, tmp_path: Path
) -> None:
    perplexities = []
    for rounding in ("gptq", "nearest"):
        options = {"bits": 2, "rounding": rounding}
        report = prune(Path("seedling"), tmp_path / rounding, text, method="uniform-bits", options=options)
        assert {row.notes["bits"] for row in report.layers} == {2.0}
        perplexities.append(report.perplexity_after or 0.0)
    assert 0 < perplexities[0] < perplexities[1]


def test_an_expert_without_tokens_is_said_and_rounded_to_the_nearest(text: Path, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "model", num_local_experts=5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # of two pairs of opposite rows one of each is positive, and the fifth never chosen
        router = model.model.layers[1].mlp.gate.weight
        router[1], router[3], router[4] = -router[0], -router[2], 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = prune(folder, tmp_path / "out", text, options={"bits": 2.0})
    assert any("expert 4 of block 1" in warning for warning in report.warnings)
    rows = [row for row in report.layers if row.block == 1 and row.matrix.endswith(".4") and row.fallbacks]
    assert len(rows) == 2
    assert all("nearest" in row.fallbacks[0] and row.notes["bits"] == 1 for row in rows)


class StopError(Exception):
    pass


@pytest.mark.parametrize(("parts", "family"), [(0, "qwen3_moe"), (1, "qwen3_moe"), (1, "gpt_oss")])
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    parts: int, family: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(family, tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=3)
    prune(model, tmp_path / "whole", text, options={"bits": 2.0})
    write = CheckpointWriter.write

    def stopping(self: CheckpointWriter, *arguments: Any) -> None:
        if len(self.parts) == parts:
            raise StopError
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(StopError):
            prune(model, tmp_path / "out", text, options={"bits": 2.0})
    monkeypatch.setattr(quantised, "_observe", lambda *_: pytest.fail("observed a second time"))
    prune(model, tmp_path / "out", text, options={"bits": 2.0}, resume=True)
    for name in ("model.safetensors", "config.json", "bits.json", "odp.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_thresholds_for_online_pruning_lie_beside_the_model(text: Path, tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model", num_hidden_layers=3)
    prune(model, tmp_path / "out", text, options={"bits": 2.0})
    plan = OnlinePlan.load(tmp_path / "out")
    assert [block.block for block in plan.blocks] == [0, 1, 2]
    assert all(0 < block.medians[0] < 1 and block.loss for block in plan.blocks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = loaded.config.vocab_size - 1 - torch.arange(40).view(1, 40)
    with secateur.prune_online(loaded, tmp_path / "out") as pruner, torch.no_grad():
        loaded(ids)
        assert pruner.blocks == [2]
        assert 0 < pruner.saved < 0.5


@pytest.mark.parametrize(
    ("family", "settings", "error", "words"),
    [
        ("llama", {}, RecipeError, "no routed experts"),
        ("mixtral", {"options": {"bits": 1.2}}, RecipeError, "bits=1.2"),
        ("mixtral", {"sparsity": 0.5}, RecipeError, "bits"),
        ("mixtral", {"budget": "bytes=1MB"}, RecipeError, "bits"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    family: str, settings: dict[str, Any], error: type[Exception], words: str, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    with pytest.raises(error, match=words):
        prune(model, tmp_path / "out", text, **settings)
    assert not (tmp_path / "out").exists()


def test_four_bit_files_of_gpt_oss_are_refused_in_one_line(text: Path, tmp_path: Path) -> None:
    model = save_tiny("gpt_oss", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    with pytest.raises(CheckpointError, match=r"quantised.*mxfp4.*dequantize=True"):
        prune(model, tmp_path / "out", text, options={"bits": 2.0})
    assert not (tmp_path / "out").exists()


def test_a_plan_says_the_bytes_that_come_out(text: Path, tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    planned = secateur.plan(model, method="mc-moe", options={**FEW, "bits": 2.0})
    report = prune(model, tmp_path / "out", text, options={"bits": 2.0})
    assert planned["bytes_before"] == report.bytes_before
    assert planned["bytes_after"] == pytest.approx(report.bytes_after, rel=0.02)
    assert "fewer bits" in planned["effect"]
    assert "fewer bits" in report.effect


def test_rounding_is_no_format_of_other_runs(text: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="which rounds"):
        secateur.prune(
            model,
            tmp_path / "out",
            method="magnitude",
            sparsity=0.5,
            format="low-bit",
            calibration=str(text),
        )
    assert not (tmp_path / "out").exists()


def test_later_blocks_are_rounded_for_what_the_rounded_ones_give(text: Path, tmp_path: Path) -> None:
    """Block 1 as GPTQ makes it from the inputs of a model whose block 0 alone is rounded."""
    source, out = save_tiny("mixtral", tmp_path / "model"), tmp_path / "out"
    report = prune(source, out, text, options={"bits": 2.0})
    half = AutoModelForCausalLM.from_pretrained(source)
    half.model.layers[0].load_state_dict(
        AutoModelForCausalLM.from_pretrained(out).model.layers[0].state_dict()
    )
    windows = load_windows(str(text), tokenizer=AutoTokenizer.from_pretrained(source), samples=6, length=24)
    for opened in Driver(MemorySource(half), windows).blocks():
        observed = opened.observe({"hessian"})
        matrix = next(m for m in opened.block.matrices if m.name == "self_attn.q_proj")
        weight = matrix.view(opened.parameters)
        opened.finish()
    expected = gptq(weight, observed[matrix.input][0], 4, group=32, steps=5).weight
    row = next(row for row in report.layers if row.block == 1 and row.matrix == matrix.name)
    assert row.loss == pytest.approx(
        reconstruction_loss(weight, expected, observed[matrix.input][0]), rel=0.02
    )
    assert all(row.loss or row.fallbacks for row in report.layers)
    name = "model.layers.1.self_attn.q_proj.weight"
    found = Checkpoint.open(out).read([name])[name]
    assert float(((found - expected).abs() < 1e-3).float().mean()) > 0.99
    dense = AutoModelForCausalLM.from_pretrained(source)
    for opened in Driver(MemorySource(dense), windows).blocks():
        observed = opened.observe({"hessian"})
        opened.finish()
    other = gptq(weight, observed[matrix.input][0], 4, group=32, steps=5).weight
    assert float(((found - other).abs() < 1e-3).float().mean()) < 0.9
