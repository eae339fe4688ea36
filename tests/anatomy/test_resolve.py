"""What verification against the model catches, and what resolving leaves alone."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_config
from torch import nn

from secateur.anatomy.resolve import resolve
from secateur.anatomy.skeleton import build_meta
from secateur.core.errors import AnatomyError


def test_a_parameter_that_the_file_does_not_declare() -> None:
    config = tiny_config("llama")
    model = build_meta(config)
    model.model.layers[1].mlp.scale = nn.Parameter(torch.empty(96, device="meta"))
    with pytest.raises(AnatomyError, match=r"a block of 'llama' has mlp\.scale;"):
        resolve(config, model)


def test_a_persistent_buffer_that_the_file_does_not_declare() -> None:
    config = tiny_config("llama")
    model = build_meta(config)
    model.model.layers[0].register_buffer("steps", torch.empty(1, device="meta"))
    with pytest.raises(AnatomyError, match=r"a block of 'llama' has steps;"):
        resolve(config, model)


def test_a_shape_other_than_declared() -> None:
    config = tiny_config("llama")
    model = build_meta(config)
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 97, bias=False, device="meta")
    with pytest.raises(
        AnatomyError, match=r"mlp\.gate_proj\.weight of 'llama' has shape \(97, 64\); expected \(96, 64\)"
    ):
        resolve(config, model)


def test_a_square_matrix_that_lies_the_other_way() -> None:
    config = tiny_config("gpt2")
    model = build_meta(config)
    model.transformer.h[1].attn.c_proj = nn.Linear(64, 64, device="meta")
    with pytest.raises(AnatomyError, match=r"attn\.c_proj is stored as \(out, in\); expected in_out"):
        resolve(config, model)


def test_a_list_of_blocks_elsewhere() -> None:
    config = tiny_config("llama")
    model = build_meta(config)
    model.model.stack = model.model.layers
    del model.model.layers
    with pytest.raises(AnatomyError, match=r"no list of blocks at 'model\.layers'; expected 2 blocks"):
        resolve(config, model)


def test_a_config_that_its_model_class_does_not_accept() -> None:
    config = tiny_config("llama", num_attention_heads=8)
    config.hidden_act = "no such function"
    with pytest.raises(AnatomyError, match="cannot build 'llama' from this config"):
        resolve(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_resolving_leaves_config_and_random_state_alone(family: str) -> None:
    config = tiny_config(family)
    written, state = config.to_dict(), torch.get_rng_state()
    resolve(config)
    assert config.to_dict() == written
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_summary_is_plain_data(family: str) -> None:
    summary = resolve(tiny_config(family)).summary()
    assert json.loads(json.dumps(summary)) == summary
    rows = [(kind, row) for kind in summary["block_kinds"] for row in kind["matrices"]]
    prunable = sum(len(k["blocks"]) * row["rows"] * row["columns"] * row["count"] for k, row in rows)
    assert prunable == summary["parameters_prunable"]


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen3", "phi3", "olmo2", "mixtral", "qwen3_moe", "gpt_oss"]),
    groups=st.integers(1, 4),
    queries=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 12]),
    ffn=st.integers(1, 70),
    layers=st.integers(1, 5),
    experts=st.integers(2, 9),
)
def test_any_size_resolves(
    family: str, groups: int, queries: int, head_dim: int, ffn: int, layers: int, experts: int
) -> None:
    """The expressions of a family file hold for every config, not for the one they were written against."""
    heads = groups * queries
    config = tiny_config(
        family,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=ffn,
        moe_intermediate_size=ffn + 1,
        num_hidden_layers=layers,
        num_experts=experts,
        layer_types=None,
    )
    anatomy = resolve(config)
    assert len(anatomy.blocks) == layers == anatomy.spaces["layers"]
    for block in anatomy.blocks:
        assert block.parameters == {name: tuple(a.size for a in axes) for name, axes in block.axes.items()}
