"""Reordering a private space leaves what a block computes as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from secateur.anatomy.permute import permute, reorder_of
from secateur.anatomy.resolve import resolve

ONLY_EXPERTS = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
MIXED_VALUES = {"gpt_neox", "deepseek_v3"}  # whose rows hold values beside keys
IDS = torch.arange(5, 29).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_weights_move(family: str) -> None:
    model = tiny_model(family)
    anatomy = resolve(model.config)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
    moved, seeded = set(), torch.Generator().manual_seed(0)
    for block in anatomy.blocks:
        parameters = model.get_submodule(block.prefix).state_dict()
        for matrix in block.matrices:
            reorder = reorder_of(block, matrix)
            if reorder is None:
                continue
            old = matrix.view(parameters).clone()
            orders = torch.rand(reorder.parts, reorder.width, generator=seeded).argsort(1)
            permute(block, parameters, reorder, orders)
            assert torch.equal(matrix.view(parameters), old[:, reorder.columns(orders)])
            moved.add("heads" if reorder.inside else "channels")
    with torch.no_grad():
        after = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(before, after, atol=2e-5), family
    assert ("channels" in moved) == (family not in ONLY_EXPERTS)
    assert ("heads" in moved) == (family not in MIXED_VALUES)
