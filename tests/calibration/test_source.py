"""Blocks out of files and out of memory are the blocks of the model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.shared import TALES_MOE, needs_shared
from secateur.calibration.source import BlockSource, FolderSource, MemorySource
from secateur.checkpoint.reader import Checkpoint


def require_same_blocks(source: BlockSource, model: PreTrainedModel) -> None:
    blocks = model.get_submodule(source.anatomy.blocks_path)
    for index, expected in enumerate(blocks):
        module = source.open(index)
        found, wanted = module.state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.to(source.dtype)), name
        assert not any(parameter.requires_grad for parameter in module.parameters())
        source.store(index, module)
        assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_blocks_of_its_model(family: str, tmp_path: Path) -> None:
    source = FolderSource(Checkpoint.open(save_tiny(family, tmp_path, max_shard_size="100KB")))
    require_same_blocks(source, tiny_model(family))
    outer = source.model.state_dict()
    for name, tensor in tiny_model(family).state_dict().items():
        assert outer[name].is_meta or torch.equal(outer[name], tensor), name
    assert not outer[source.anatomy.embedding + ".weight"].is_meta


@needs_shared
def test_experts_on_disk_become_fused_ones() -> None:
    require_same_blocks(
        FolderSource(Checkpoint.open(TALES_MOE)), AutoModelForCausalLM.from_pretrained(TALES_MOE).float()
    )


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_tied_weights_are_one_tensor(family: str, tmp_path: Path) -> None:
    for source in (
        FolderSource(Checkpoint.open(save_tiny(family, tmp_path))),
        MemorySource(tiny_model(family)),
    ):
        assert source.anatomy.tied
        for alias, name in source.anatomy.tied.items():
            assert source.model.get_parameter(alias) is source.model.get_parameter(name)


def test_the_cpu_computes_in_float32_unless_told_otherwise(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    source = FolderSource(checkpoint)
    assert source.dtype == source.model.dtype == torch.float32
    assert source.in_dtype(torch.float32) is source
    half = source.in_dtype(torch.bfloat16)
    assert {parameter.dtype for parameter in half.open(0).parameters()} == {torch.bfloat16}
    assert MemorySource(tiny_model("llama", dtype=torch.bfloat16)).dtype == torch.float32


def test_what_a_family_keeps_in_float32_stays_there(tmp_path: Path) -> None:
    folder = save_tiny("deepseek_v3", tmp_path)
    block = FolderSource(Checkpoint.open(folder), dtype=torch.bfloat16).open(2)
    dtypes = {name: tensor.dtype for name, tensor in block.state_dict().items()}
    assert dtypes.pop("mlp.gate.e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_blocks_may_be_read_from_elsewhere(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny("llama", tmp_path))

    def read(index: int) -> dict[str, torch.Tensor] | None:
        names = [name for name in checkpoint.tensors if f"layers.{index}." in name]
        return {name: torch.ones(checkpoint.tensors[name].shape) for name in names} if index else None

    source = FolderSource(checkpoint, read=read)
    assert bool((source.open(1).self_attn.q_proj.weight == 1).all())
    assert torch.equal(
        source.open(0).self_attn.q_proj.weight, tiny_model("llama").model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_changes_of_a_stored_block_reach_the_model_in_memory(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = MemorySource(model)
    require_same_blocks(source, model)
    module = source.open(1)
    matrix = source.anatomy.blocks[1].matrices[-1]
    matrix.view(module.state_dict())[0] = 0
    source.store(1, module)
    name = f"{source.anatomy.blocks[1].prefix}.{matrix.parameter}"
    changed = model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], changed[key])] == [name]
    own = nn.Module.state_dict(model.get_submodule(source.anatomy.blocks[1].prefix))
    assert bool((matrix.view(own)[0] == 0).all())


def test_a_float32_model_in_memory_is_not_copied() -> None:
    model = tiny_model("llama")
    source = MemorySource(model)
    ours = source.open(0).self_attn.q_proj.weight
    assert ours.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert source.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (model.config.use_cache, source.model.config.use_cache) == (True, False)
