"""Experts and their router are found by axes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.model import Block
from secateur.anatomy.resolve import resolve
from secateur.core.errors import AnatomyError

ROUTERS = {
    "mixtral": ("mlp.gate.weight", None, None),
    "qwen2_moe": ("mlp.gate.weight", None, None),
    "deepseek_v3": ("mlp.gate.weight", None, "mlp.gate.e_score_correction_bias"),
    "gpt_oss": ("mlp.router.weight", "mlp.router.bias", None),
}


def last_block(family: str) -> Block:
    return resolve(tiny_config(family)).blocks[-1]


@pytest.mark.parametrize("family", ROUTERS)
def test_the_router_and_what_it_adds(family: str) -> None:
    found = mixture_of(last_block(family))
    assert (found.router, found.bias, found.correction) == ROUTERS[family]
    assert (found.space, found.count, found.module) == ("experts", 4, "mlp.experts")
    assert found.router_module == found.router.removesuffix(".weight")


def test_transposed_experts_are_seen_as_outputs_by_inputs() -> None:
    model = tiny_model("gpt_oss")
    parameters = dict(model.model.layers[-1].state_dict())
    found = mixture_of(last_block("gpt_oss")).weights(parameters)
    assert {name: tuple(stack.shape) for name, stack in found.items()} == {
        "mlp.experts.gate_up_proj": (4, 192, 64),
        "mlp.experts.down_proj": (4, 64, 96),
    }
    assert torch.equal(found["mlp.experts.down_proj"][1], parameters["mlp.experts.down_proj"][1].T)


def test_dense_blocks_have_none() -> None:
    assert mixture_of(last_block("llama")) is None
    assert mixture_of(resolve(tiny_config("deepseek_v3")).blocks[0]) is None


def test_experts_without_exactly_one_router_are_refused() -> None:
    block = last_block("mixtral")
    axes = dict(block.axes)
    router = axes.pop("mlp.gate.weight")
    with pytest.raises(AnatomyError, match="0 matrices with a row for each expert"):
        mixture_of(replace(block, axes=axes))
    twice = {**block.axes, "mlp.second.weight": router}
    with pytest.raises(AnatomyError, match="2 matrices with a row for each expert"):
        mixture_of(replace(block, axes=twice))
