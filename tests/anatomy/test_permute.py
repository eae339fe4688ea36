"""Reordering a private space leaves what a block computes as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from secateur.anatomy.permute import permutable_space, permute
from secateur.anatomy.resolve import resolve

ONLY_EXPERTS = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
IDS = torch.arange(5, 29).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_weights_move(family: str) -> None:
    model = tiny_model(family)
    anatomy = resolve(model.config)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
    moved = 0
    for block in anatomy.blocks:
        parameters = model.get_submodule(block.prefix).state_dict()
        for matrix in block.matrices:
            space = permutable_space(matrix)
            if space is None:
                continue
            old = matrix.view(parameters).clone()
            order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(block.index))
            permute(block, parameters, space, order)
            assert torch.equal(matrix.view(parameters), old[:, order])
            moved += 1
    with torch.no_grad():
        after = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(before, after, atol=2e-5), family
    assert (moved == 0) == (family in ONLY_EXPERTS)
