"""What `inspect` says from files alone is what it says through the model, which it asks when in doubt."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, UNLISTED, save_tiny, tiny_model

from secateur.cli.render import inspection
from secateur.core.errors import InputError
from secateur.pipeline import inspect as room
from secateur.pipeline.inspect import inspect

BUILT = "is inspected through its model"


def through_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(room, "_predicted", lambda headers: None)
        return inspect(folder)


def assert_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both paths agree, in content and in order, and no model is needed."""
    expected = through_the_model(folder, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_built", lambda headers: pytest.fail("a model was built"))
        found = inspect(folder)
    assert json.dumps(found) == json.dumps(expected)
    assert str(list(map(vars, inspection(found)))) == str(list(map(vars, inspection(expected))))
    return found


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(save_tiny(family, tmp_path), monkeypatch)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("deepseek_v3", {"q_lora_rank": None}),
    ],
)
def test_unusual_members(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_alike(save_tiny(family, tmp_path, max_shard_size="100KB", **changes), monkeypatch)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_experts_one_by_one_or_fused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = assert_alike(save_tiny(family, tmp_path), monkeypatch)
    tensors = {name: tensor.clone() for name, tensor in tiny_model(family).state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fused = assert_alike(tmp_path, monkeypatch)
    assert fused["tensors"] < apart["tensors"]
    assert fused["block_kinds"] == apart["block_kinds"]


def test_tensors_of_no_module_and_names_without_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny("gpt2", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.attn.masked_bias"] = tensors["transformer.ln_f.bias"].clone()
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, path)
    assert assert_alike(tmp_path, monkeypatch)["untouched_tensors"] == ["h.0.attn.masked_bias"]


def test_a_bias_that_the_model_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of a fine-tuned Llama may have it: in the files, ignored by the model."""
    save_tiny("llama", tmp_path, attention_bias=True)
    change_config(tmp_path, attention_bias=False)
    assert len(assert_alike(tmp_path, monkeypatch)["untouched_tensors"]) == 8


@pytest.mark.parametrize("family", UNLISTED)
def test_others_are_asked_of_the_model(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "secateur"):
        assert inspect(save_tiny(family, tmp_path))["inferred"]
    assert f"{BUILT}: no family file for '{family}'" in caplog.text


def test_what_the_config_leaves_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("llama", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.DEBUG, "secateur"):
        assert inspect(tmp_path)["max_length_tokens"] == 2048
    assert f"{BUILT}: the config has no max_position_embeddings" in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 128}, "shape"),
        ({"num_attention_heads": 6}, "not a multiple"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"attention_bias": True}, r"no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "nosuchmodel"}, "model type"),
    ],
)
def test_configs_that_do_not_fit_are_refused_as_by_the_model(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=says) as found:
        inspect(tmp_path)
    with pytest.raises(InputError) as expected:
        through_the_model(tmp_path, monkeypatch)
    assert str(found.value) == str(expected.value)
