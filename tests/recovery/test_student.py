"""Merging gives the model that was trained, and zeros stay zeros, in every kind of matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from secateur.anatomy.resolve import resolve
from secateur.recovery.full import Full
from secateur.recovery.lora import Lora
from secateur.recovery.student import Student, matrix_parameters

IDS = torch.arange(1, 25).view(2, 12)
FAMILIES = ["llama", "gpt2", "phi3", "opt", "gemma2"]


def sparse(family: str) -> PreTrainedModel:
    """Half of the weights of every second matrix are zero."""
    model = tiny_model(family)
    with torch.no_grad():
        for block in resolve(model.config).blocks:
            tensors = dict(model.get_submodule(block.prefix).named_parameters())
            for name in list(matrix_parameters(block))[::2]:
                tensors[name][..., ::2] = 0
    return model


def shaken(student: Student) -> Student:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.parameters.items():
            scale = 0.1 if "lora" in name else 0.0
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return student


def put_back(student: Student, family: str) -> PreTrainedModel:
    """The stock model with the merged blocks."""
    model = sparse(family)
    for block in student.anatomy.blocks:
        module = model.get_submodule(block.prefix)
        stored = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(student.merged(block, stored))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep_zeros", [True, False])
def test_merged_is_what_was_trained(family: str, keep_zeros: bool) -> None:
    before = sparse(family)
    model = sparse(family)
    anatomy = resolve(model.config)
    student = shaken(Lora(keep_zeros=keep_zeros).student(model, anatomy, None))
    adapted = student.model(IDS).logits
    after = put_back(student, family)
    torch.testing.assert_close(after(IDS).logits, adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, before(IDS).logits, atol=1e-3)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    zeros = {name: tensor == 0 for name, tensor in old.items() if tensor.ndim == 2 and (tensor == 0).any()}
    assert zeros
    kept = all(bool((new[name][where] == 0).all()) for name, where in zeros.items())
    assert kept == keep_zeros
    assert new.keys() == old.keys()


def test_adapters_begin_as_the_model_itself_bit_for_bit() -> None:
    model = sparse("llama")
    student = Lora().student(model, resolve(model.config), None)
    for block in student.anatomy.blocks:
        stored = sparse("llama").get_submodule(block.prefix).state_dict()
        for name, tensor in student.merged(block, stored).items():
            assert tensor.numpy().tobytes() == stored[name].numpy().tobytes()


def test_ranks_and_scale_of_every_block() -> None:
    model = tiny_model("llama")
    method = Lora(rank=8, alpha=4, rank_from="importance", dropout=0.5)
    student = method.student(model, resolve(model.config), torch.tensor([0.1, 0.3]))
    layers: list[Any] = [model.model.layers[index].mlp.down_proj for index in (0, 1)]
    ranks = [layer.lora_A["default"].weight.shape[0] for layer in layers]
    assert sum(ranks) == 16
    assert ranks[0] < ranks[1]
    assert [layer.scaling["default"] for layer in layers] == [0.5, 0.5]
    student.training(True)
    assert layers[0].lora_dropout.training
    assert not model.training


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_full_training_moves_zeros_only_if_allowed(keep_zeros: bool) -> None:
    model = sparse("qwen3_moe")
    student = Full(keep_zeros=keep_zeros).student(model, resolve(model.config), None)
    optimizer = torch.optim.AdamW(student.parameters.values(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        student.model(IDS, labels=IDS).loss.backward()
        student.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
    before, after = dict(sparse("qwen3_moe").named_parameters()), dict(model.named_parameters())
    moved = {name for name, old in before.items() if bool((after[name][old == 0] != 0).any())}
    assert any("experts" in name for name in moved) != keep_zeros
    assert not any("proj.weight" in name for name in moved) or not keep_zeros
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.gate.weight"], after["model.layers.0.mlp.gate.weight"])
