"""GGUF files read back: names, shapes, keys and numbers; what cannot be held is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import dies
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_tokenizer

import secateur
from secateur.anatomy.parts import parts_of
from secateur.anatomy.shorter import shorter_config
from secateur.cli.app import run
from secateur.core.errors import ExportError, InputError, OutputError
from secateur.formats.catalogue import families
from secateur.formats.gguf_tensors import neighbours
from secateur.pipeline.opened import open_model

from .cut_models import save_cut

gguf = pytest.importorskip("gguf")
ROTATED = ("llama", "mistral", "mixtral", "granite", "phi3")
CHANGES: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def exported(model: Path, out: Path, dtype: str = "f32") -> tuple[dict[str, Any], Any]:
    out.unlink(missing_ok=True)
    return secateur.export(model, out, dtype=dtype), gguf.GGUFReader(out)


def tensors(reader: Any) -> dict[str, torch.Tensor]:
    """As torch has them: the file names the innermost dimension first."""
    return {
        tensor.name: torch.from_numpy(np.array(tensor.data)).view(*reversed(tensor.shape.tolist()))
        for tensor in reader.tensors
    }


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The opposite of `neighbours`, entry by entry."""
    back = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        head, place = divmod(row, head_dim)
        pair, second = divmod(place, 2)
        back[head * head_dim + second * (head_dim // 2) + pair] = weight[row]
    return back


def test_rows_that_turn_together_become_neighbours_and_back() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(halves(neighbours(weight, 8), 8), weight)
    assert torch.equal(neighbours(weight, 8)[1], weight[4])
    assert torch.equal(halves(neighbours(weight[:, 0], 8)[:, None], 8)[:, 0], weight[:, 0])


@pytest.mark.parametrize("family", sorted(families()))
def test_every_weight_of_every_family_is_in_the_file(family: str, place: Path) -> None:
    model = save_tiny(family, place / family, **CHANGES.get(family, {}))
    facts, reader = exported(model, place / f"{family}.gguf")
    found = tensors(reader)
    stored = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    arch = facts["architecture"]
    assert value(reader, "general.architecture") == arch
    assert value(reader, f"{arch}.block_count") == config["num_hidden_layers"]
    assert value(reader, f"{arch}.attention.head_count") == config["num_attention_heads"]
    head_dim = value(reader, f"{arch}.attention.key_length")
    query = found["blk.1.attn_q.weight"]
    if family in ROTATED:
        query = halves(query, head_dim)
    if family == "phi3":
        fused = stored["model.layers.1.self_attn.qkv_proj.weight"]
        assert torch.equal(query, fused[: query.shape[0]])
        assert torch.equal(found["blk.1.attn_v.weight"], fused[-found["blk.1.attn_v.weight"].shape[0] :])
        gate_up = stored["model.layers.1.mlp.gate_up_proj.weight"]
        assert torch.equal(torch.cat([found["blk.1.ffn_gate.weight"], found["blk.1.ffn_up.weight"]]), gate_up)
    else:
        assert torch.equal(query, stored["model.layers.1.self_attn.q_proj.weight"])
    norm = stored["model.norm.weight"]
    assert torch.equal(found["output_norm.weight"], norm + 1 if family.startswith("gemma") else norm)
    assert torch.equal(found["token_embd.weight"], stored["model.embed_tokens.weight"])
    own_head = "lm_head.weight" in stored
    assert ("output.weight" in found) == (own_head or family == "olmo2")
    silent = facts["parameters"] - sum(tensor.numel() for tensor in stored.values())
    assert silent == 0


def test_experts_are_stacked_in_their_order(place: Path) -> None:
    model = save_tiny("mixtral", place / "experts")
    _, reader = exported(model, place / "experts.gguf")
    found, stored = tensors(reader), load_file(model / "model.safetensors")
    for expert in range(4):
        for name, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            own = stored[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert torch.equal(found[f"blk.1.ffn_{part}_exps.weight"][expert], own)
    assert value(reader, "llama.expert_count") == 4
    assert value(reader, "llama.expert_used_count") == 2


@pytest.mark.parametrize(("dtype", "error"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_other_dtypes_are_close_and_vectors_stay_exact(dtype: str, error: float, place: Path) -> None:
    out = place / f"{dtype}.gguf"
    out.unlink(missing_ok=True)
    secateur.export("seedling", out, dtype=dtype)
    reader = gguf.GGUFReader(out)
    stored = load_file(Path(secateur.inspect("seedling")["folder"]) / "model.safetensors")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    down = by_name["blk.2.ffn_down.weight"]
    whole = torch.from_numpy(np.array(gguf.dequantize(down.data, down.tensor_type)))
    weight = stored["model.layers.2.mlp.down_proj.weight"].float()
    assert (whole - weight).abs().max() <= error * weight.abs().max()
    assert down.tensor_type.name == dtype.upper()
    norm = by_name["blk.2.ffn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    expected = stored["model.layers.2.post_attention_layernorm.weight"].float()
    assert torch.equal(torch.from_numpy(np.array(norm.data)), expected)


def test_blocks_that_differ_are_arrays_of_sizes(place: Path) -> None:
    model = save_cut("llama", place)
    facts, reader = exported(model, place / "cut.gguf")
    sizes = json.loads((model / "config.json").read_text())["per_layer_config"]
    assert facts["architecture"] == "deci"
    for key, own in {
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }.items():
        expected = [sizes[str(index)][own] for index in range(3)]
        assert value(reader, f"deci.{key}") == expected
        assert len(set(expected)) > 1 or key != "feed_forward_length"
    assert value(reader, "deci.attention.key_length") == 8
    found, stored = tensors(reader), load_file(model / "model.safetensors")
    for index in range(3):
        own = stored[f"model.layers.{index}.self_attn.k_proj.weight"]
        assert torch.equal(halves(found[f"blk.{index}.attn_k.weight"], 8), own)


def test_added_biases_go_where_the_graph_reads_them(place: Path) -> None:
    model = save_cut("qwen2", place, compensate="bias")
    facts, reader = exported(model, place / "bias.gguf")
    found, stored = tensors(reader), load_file(model / "model.safetensors")
    assert facts["architecture"] == "deci"  # the graph of qwen2 reads no such biases
    for name, part in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output")):
        assert torch.equal(found[f"blk.2.{part}.bias"], stored[f"model.layers.2.{name}.bias"])
    rotated = halves(found["blk.2.attn_q.bias"][:, None], 8)[:, 0]
    assert torch.equal(rotated, stored["model.layers.2.self_attn.q_proj.bias"])


def leave_out(folder: Path, skips: dict[int, list[str]]) -> None:
    """Take parts of blocks out of a checkpoint of one file."""
    opened = open_model(folder)
    config, parts = opened.checkpoint.config, parts_of(opened.config)
    kept = range(len(opened.anatomy.blocks))
    updates, _ = shorter_config(config, opened.anatomy, kept, skips, parts)
    gone = tuple(f".{index}.{name}." for index, own in skips.items() for part in own for name in parts[part])
    tensors = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not any(path in name for path in gone)}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **updates}))


def test_blocks_without_a_part_are_written_as_llama_cpp_takes_them(place: Path) -> None:
    model = save_cut("llama", place, targets="ffn")
    leave_out(model, {0: ["self_attn"], 1: ["self_attn"], 2: ["mlp"]})
    _, reader = exported(model, place / "skip.gguf")
    found = tensors(reader)
    ffn = value(reader, "deci.feed_forward_length")
    assert value(reader, "deci.attention.head_count_kv") == [1, 0, 2]  # block 0 tells the width of a head
    assert ffn[2] == 1  # 0 would drop the attention of the block
    assert not any(name.startswith("blk.1.attn") for name in found)
    assert not found["blk.0.attn_output.weight"].any()
    assert not found["blk.2.ffn_down.weight"].any()
    assert found["blk.2.attn_output.weight"].any()


def test_the_tokenizer_is_in_the_file(place: Path) -> None:
    _, reader = exported(save_tiny("llama", place / "words"), place / "words.gguf")
    tokenizer = tiny_tokenizer()
    words = value(reader, "tokenizer.ggml.tokens")
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert len(words) == 320
    assert all(words[row] == word for word, row in tokenizer.get_vocab().items())
    assert value(reader, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.ggml.token_type")[0] == gguf.TokenType.CONTROL


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "no GGUF for model type 'gpt2'"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("qwen3", {"attention_bias": True}, "bias of self_attn.o_proj"),
        ("qwen3_moe", {"norm_topk_prob": False}, "do not sum to one"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "attention scale"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_one_line(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(family, tmp_path / "model", **changes)
    capsys.readouterr()
    assert run(["export", str(model), "-o", str(tmp_path / "out.gguf")]) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert len(message.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_blocks_that_differ_in_a_family_without_such_a_graph_are_refused(place: Path) -> None:
    model = save_cut("qwen3", place)
    with pytest.raises(ExportError, match=r"blocks of different sizes.*--format dense"):
        secateur.export(model, place / "no.gguf")
    assert not (place / "no.gguf").exists()


def test_a_tokenizer_without_a_name_is_refused_unless_it_is_left_out(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation"}, content["pre_tokenizer"]],
    }
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"a way of its own \(Punctuation\).*--no-tokenizer"):
        secateur.export(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    facts = secateur.export(model, tmp_path / "out.gguf", tokenizer=False)
    assert facts["tokenizer"] == "none"


def test_bad_requests(tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        secateur.export("seedling", taken)
    assert taken.read_text() == "mine"
    with pytest.raises(OutputError, match="no folder"):
        secateur.export("seedling", tmp_path / "nowhere" / "a.gguf")
    with pytest.raises(InputError, match="dtype 'q4'"):
        secateur.export("seedling", tmp_path / "a.gguf", dtype="q4")
    with pytest.raises(InputError, match="gguf or dense"):
        secateur.export("seedling", tmp_path / "a.gguf", format="onnx")


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_export_leaves_no_file_and_the_next_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    dies("secateur.formats.gguf_file:_encoded", 2, secateur.export, "seedling", out)
    assert not out.exists()
    secateur.export("seedling", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert len(gguf.GGUFReader(out).tensors) == 56


def test_a_failing_export_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.formats.gguf_file._encoded", fails)
    with pytest.raises(KeyboardInterrupt):
        secateur.export("seedling", tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
