"""Opening and reading checkpoints, and every way in which one can be unusable."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import CheckpointError

from .samples import INDEX, MakeCheckpoint, small_tensors

SHARD_2 = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_saved(make_checkpoint: MakeCheckpoint, shards: int):
    checkpoint = Checkpoint.open(make_checkpoint(shards=shards))
    expected = small_tensors()
    found = checkpoint.read(reversed(expected))
    assert list(found) == list(reversed(expected))
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.parameters == sum(tensor.numel() for tensor in expected.values())
    assert len(checkpoint.shards) == shards


def test_reads_a_trained_model(trained: Path):
    checkpoint = Checkpoint.open(trained)
    expected = load_file(trained / "model.safetensors")
    found = checkpoint.read(checkpoint.tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected | found)
    assert checkpoint.config == json.loads((trained / "config.json").read_text())


def test_opening_touches_no_weights(make_checkpoint: MakeCheckpoint):
    """A header that promises a terabyte over a sparse file: opening reads the header only."""
    folder = make_checkpoint()
    header = {"w": {"dtype": "BF16", "shape": [2**20, 2**19], "data_offsets": [0, 2**40]}}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 2**40)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.nbytes == 2**40
    assert checkpoint.parameters == 2**39
    assert len(checkpoint.fingerprint()) == 64


def test_an_unknown_name(make_checkpoint: MakeCheckpoint):
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        Checkpoint.open(make_checkpoint()).read(["nothing"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(make_checkpoint: MakeCheckpoint, dtype: torch.dtype, bad: float):
    weight = torch.ones(50, 40, dtype=dtype)
    weight[[0, 17, 49], [0, 39, 1]] = bad
    checkpoint = Checkpoint.open(make_checkpoint(tensors={"fine": torch.ones(3), "bad.weight": weight}))
    with pytest.raises(CheckpointError, match=r"'bad\.weight' .* has 3 NaN or infinite values of 2000"):
        checkpoint.read(["fine", "bad.weight"])
    assert torch.equal(
        checkpoint.read(["bad.weight"], check_finite=False)["bad.weight"].isfinite(), weight == 1
    )


# --- unusable folders ---------------------------------------------------------------------------------


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _config_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def _config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _missing_shard(folder: Path) -> None:
    (folder / SHARD_2).unlink()


def _truncated_shard(folder: Path) -> None:
    os.truncate(folder / SHARD_2, (folder / SHARD_2).stat().st_size - 1)


def _empty_shard(folder: Path) -> None:
    os.truncate(folder / SHARD_2, 0)


def _no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _pickled(folder: Path) -> None:
    _no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _damaged_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def _index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')


def _change_index(folder: Path, name: str, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def _index_names_absent_tensor(folder: Path) -> None:
    _change_index(folder, "model.layers.99.weight", SHARD_2)


def _index_leaves_folder(folder: Path) -> None:
    _change_index(folder, "model.layers.99.weight", "../elsewhere.safetensors")


def _duplicate(folder: Path) -> None:
    tensors = load_file(folder / SHARD_2)
    save_file({**tensors, "model.embed_tokens.weight": torch.zeros(2)}, folder / SHARD_2)


def _single_file_as_well(folder: Path) -> None:
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_config, "no config.json in"),
        (_damaged_config, "config.json does not parse"),
        (_config_not_text, "config.json does not parse"),
        (_config_a_list, "config.json holds a list"),
        (_missing_shard, f"1 of 3 shards are missing .*{SHARD_2}"),
        (_truncated_shard, f"{SHARD_2} is cut short"),
        (_empty_shard, f"{SHARD_2} is cut short"),
        (_no_weights, "holds no weights"),
        (_pickled, r"pickled weights only \(pytorch_model.bin\).*convert them: python -c"),
        (_no_index, "neither model.safetensors nor an index"),
        (_damaged_index, "index.json does not parse"),
        (_index_without_map, "no weight_map"),
        (_index_names_absent_tensor, f"'model.layers.99.weight' in {SHARD_2}, which lacks it"),
        (_index_leaves_folder, "places 'model.layers.99.weight' in '../elsewhere.safetensors'"),
        (_duplicate, "'model.embed_tokens.weight' lies in both"),
        (_single_file_as_well, "has both"),
    ],
)
def test_unusable(make_checkpoint: MakeCheckpoint, damage, says: str):
    folder = make_checkpoint(shards=3)
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"bits": 4}}},
    ],
)
def test_quantised_by_config(make_checkpoint: MakeCheckpoint, config):
    with pytest.raises(CheckpointError, match="is quantised"):
        Checkpoint.open(make_checkpoint(**config))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8),
        ("model.layers.0.mlp.experts.gate_up_proj_scales", torch.uint8),
        ("model.layers.0.q_proj.qweight", torch.int32),
        ("model.layers.0.q_proj.weight", torch.float8_e4m3fn),
        ("model.layers.0.q_proj.weight", torch.int8),
        ("model.layers.0.q_proj.weight", torch.uint8),
        ("model.layers.0.q_proj.weight_scale_inv", torch.float32),
        ("model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4", torch.float32),
    ],
)
def test_quantised_by_tensor(make_checkpoint: MakeCheckpoint, name: str, dtype: torch.dtype):
    folder = make_checkpoint(tensors={name: torch.ones(4, 4).to(dtype), "fine": torch.ones(2)})
    with pytest.raises(CheckpointError, match="is quantised"):
        Checkpoint.open(folder)


def test_buffers_of_integers_are_no_quantisation(make_checkpoint: MakeCheckpoint):
    """Old GPT-style files carry causal masks as bytes."""
    tensors = {"attn.bias": torch.ones(1, 1, 4, 4).to(torch.uint8), "router.scale": torch.ones(2)}
    config = {"quantization_config": None}
    assert Checkpoint.open(make_checkpoint(tensors=tensors, **config)).parameters == 18


# --- fingerprint and companions -----------------------------------------------------------------------


def test_copies_have_one_fingerprint(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    first = make_checkpoint(shards=3)
    shutil.copytree(first, tmp_path / "copy")
    assert Checkpoint.open(first).fingerprint() == Checkpoint.open(tmp_path / "copy").fingerprint()


def test_every_bit_of_a_small_model_counts(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    original = Checkpoint.open(make_checkpoint())
    seen = {original.fingerprint()}
    changed_config = Checkpoint.open(make_checkpoint(tmp_path / "config", b=3))
    seen.add(changed_config.fingerprint())
    path = original.folder / "model.safetensors"
    content = path.read_bytes()
    for position in range(original.tensors["model.counter"].start, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        seen.add(original.fingerprint())
    assert len(seen) == 2 + len(range(original.tensors["model.counter"].start, len(content), 97))


CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
]
LEFT = [
    "README.md",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.bin",
    "model-q4.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.onnx",
    "model.pt",
    "pytorch_model.bin.index.json",
    "report.json",
    "report.html",
    "training_args.bin",
    ".gitattributes",
]
CODE = ["modeling_own.py", "tokenization_own.py"]


@pytest.mark.parametrize("config", [{}, {"auto_map": {"AutoConfig": "modeling_own.Config"}}])
def test_companions(make_checkpoint: MakeCheckpoint, config):
    folder = make_checkpoint(**config)
    for name in CARRIED + LEFT + CODE:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    found = {path.name for path in Checkpoint.open(folder).companions()}
    assert found == {*CARRIED, *(CODE if config else [])}
