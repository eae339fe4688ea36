"""What tests of this room do with checkpoint files: read all, load through a layout, compare with stock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resolve import resolve
from secateur.anatomy.skeleton import build_skeleton, load_tensors


def read_folder(folder: Path) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Config and every tensor on disk."""
    files = sorted(folder.glob("*.safetensors"))
    return AutoConfig.from_pretrained(folder), {
        name: tensor for file in files for name, tensor in load_file(file).items()
    }


def layout_of(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> FileLayout:
    return FileLayout(resolve(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def load_by_layout(config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The whole model, filled block by block."""
    anatomy, layout = resolve(config), layout_of(config, tensors)
    model = build_skeleton(config, next(iter(tensors.values())).dtype)
    load_tensors(model, layout.assemble_outer(pick(tensors, layout.outer_names())))
    for block in anatomy.blocks:
        parameters = layout.assemble(block.index, pick(tensors, layout.block_names(block.index)))
        load_tensors(model.get_submodule(block.prefix), parameters)
    return model


def pick(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def assert_same_model(ours: PreTrainedModel, folder: Path) -> None:
    """Bit-equal parameters and persistent buffers to `from_pretrained`, and its logits.

    Logits may differ in the last bits: where tensors lie in memory decides between kernels. A few buffers are
    float32 in the model whatever the files have; nothing is lost on the way.
    """
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = stock.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits)


def assert_bijection(config: PretrainedConfig, tensors: Mapping[str, Tensor], untouched: set[str]) -> None:
    """Every tensor belongs to one block, to the outside or to nothing, and blocks come back bit for bit."""
    layout = layout_of(config, tensors)
    names = [name for index in range(config.num_hidden_layers) for name in layout.block_names(index)]
    names += [*layout.outer_names(), *layout.untouched]
    assert sorted(names) == sorted(tensors)
    assert set(layout.untouched) == untouched
    for index in range(config.num_hidden_layers):
        stored = pick(tensors, layout.block_names(index))
        back = layout.disassemble(index, layout.assemble(index, stored))
        assert list(back) == list(stored)
        for name, tensor in stored.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
