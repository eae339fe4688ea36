"""Where a result loads: judged from its configuration, and transformers tried in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

import secateur
from secateur.checkpoint.headers import Headers
from secateur.cli.app import run
from secateur.evaluation.reopen import reopen
from secateur.formats.loads_in import loads_in

from .cut_models import save_cut

PLENTY = 1 << 40


def judged(folder: Path | str) -> dict[str, str]:
    headers = Headers.open(folder)
    return loads_in(headers.config, headers.tensors)


def test_a_stock_model_loads_everywhere() -> None:
    found = judged("seedling")
    assert found["transformers"] == "yes: stock class LlamaForCausalLM"
    assert found["vllm"].startswith("yes")
    assert found["gguf"].startswith("yes")
    assert "architecture llama " in found["gguf"]
    assert "not tried here" in found["vllm"]
    assert "not tried here" in found["gguf"]


def test_blocks_that_differ_load_with_code_or_as_deci(tmp_path: Path) -> None:
    found = judged(save_cut("llama", tmp_path))
    assert found["transformers"].startswith("yes: after `import secateur`")
    assert found["vllm"].startswith("no: blocks differ in size")
    assert "architecture deci " in found["gguf"]
    other = judged(save_cut("qwen3", tmp_path))
    assert other["gguf"].startswith("no: 'qwen3' as GGUF: architecture qwen3 of llama.cpp holds no blocks of")


def test_added_biases_alone_keep_a_model_out_of_vllm(tmp_path: Path) -> None:
    """Where the class has keys for such biases, they keep no model out."""
    assert judged(save_cut("llama", tmp_path, "bias", spread="uniform"))["vllm"].startswith("yes")
    found = judged(save_cut("mistral", tmp_path, "bias", spread="uniform"))
    assert found["vllm"].startswith("no: biases that its class does not have")
    assert "architecture llama " in found["gguf"]


def test_fewer_heads_need_a_class_that_reads_their_width(tmp_path: Path) -> None:
    assert judged(save_cut("qwen2", tmp_path, spread="uniform"))["vllm"].startswith("no: its qwen2 class")
    assert judged(save_cut("mistral", tmp_path, spread="uniform"))["vllm"].startswith("yes")


def test_blocks_with_different_numbers_of_experts_load_with_code_alone() -> None:
    model = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
    mixture = {**model, "model_type": "mixtral", "num_local_experts": 8, "architectures": ["Mixtral"]}
    assert loads_in(mixture, [])["vllm"].startswith("yes")
    uneven = {**mixture, "per_layer_config": {"1": {"num_local_experts": 6}}}
    found = loads_in({**uneven, "model_type": "secateur", "base_model_type": "mixtral"}, [])
    assert found["vllm"].startswith("no: blocks differ in size")
    assert found["gguf"].startswith("no: ")


def test_unknown_models_are_no_failure() -> None:
    found = loads_in({"model_type": "falcon"}, [])
    assert found["gguf"].startswith("no: no GGUF for model type 'falcon'")
    assert loads_in({"model_type": "llama", "num_hidden_layers": 2}, [])["gguf"].startswith("no: ")


@pytest.mark.reopens
def test_a_run_tries_its_result_and_says_so_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "seedling", "-o", str(tmp_path / "out"), "--method", "flap", "--sparsity", "0.2"]
    command += ["-O", "spread=global", "--samples", "2", "--length", "32", "--evaluation-windows", "0"]
    assert run([*command, "--no-measure-speed"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())["loads_in"]
    expected = "(SecateurLlamaForCausalLM, opened and run in a fresh process)"
    assert found["transformers"].startswith("yes: after `import secateur`")
    assert expected in found["transformers"]
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.html", "README.md")]
    for text in (said, *pages):
        assert "opened and run in a fresh" in text.replace("\n", " ")
        assert "deci" in text
    assert "trust_remote_code=True" in pages[1]
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert "loads in gguf" in capsys.readouterr().out


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise AssertionError("a process was started")

    monkeypatch.setattr("secateur.evaluation.reopen.reopen", fails)
    report = secateur.prune(
        "seedling", tmp_path / "out", method="magnitude", sparsity=0.5, check_loading=False,
        calibration={"samples": 1, "length": 16}, evaluation_windows=0, measure_speed=False,
    )  # fmt: skip
    assert report.loads_in["transformers"] == "yes: stock class LlamaForCausalLM"
    assert report.loads_in["vllm"].startswith("yes")


def asked(folder: Path, **changes: Any) -> str:
    return reopen(folder, **{"own_code": False, "nbytes": 1, "free_bytes": PLENTY, **changes})


@pytest.mark.reopens
def test_what_is_wrong_with_files_is_seen_with_and_without_weights(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    large = asked(model, nbytes=5_000_000_000)
    assert large == "yes: LlamaForCausalLM, built without weights in a fresh process"
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:7].clone()}, model / "model.safetensors", {"format": "pt"})
    assert asked(model, nbytes=5_000_000_000).startswith(f"no: {name} is [7, 64] on disk and [96, 64]")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert asked(model).startswith(f"no: missing keys {name}")
