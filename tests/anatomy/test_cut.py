"""Cutting a block: closed-form counts, and the same output as the block with the units silenced."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from secateur.anatomy.cut import (
    cut_block,
    cut_outer,
    cut_shapes,
    entries,
    residual_spaces,
    space_parameters,
)
from secateur.anatomy.model import Axis, Segment
from secateur.anatomy.resolve import resolve


def test_entries_follow_segments_and_units() -> None:
    fused = Axis((Segment("heads", 4, 2), Segment("kv_heads", 2, 2), Segment(None, 3, 1)))
    kept = {"heads": torch.tensor([0, 3]), "kv_heads": torch.tensor([1])}
    assert entries(fused, kept).tolist() == [0, 1, 6, 7, 10, 11, 12, 13, 14]
    assert entries(fused, {"ffn": torch.tensor([0])}) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_counts_agree_with_what_is_cut(family: str) -> None:
    model = tiny_model(family)
    for block in resolve(model.config).blocks:
        spaces = {s.space: s.count for axes in block.axes.values() for axis in axes for s in axis.segments}
        parameters = dict(model.get_submodule(block.prefix).state_dict())
        for space in {name for name in spaces if name in ("ffn", "moe_ffn", "heads", "kv_heads", "experts")}:
            kept = {space: torch.arange(1, spaces[space])}
            smaller = cut_block(block, parameters, kept)
            shapes = cut_shapes(block, {space: spaces[space] - 1})
            assert {name: tuple(tensor.shape) for name, tensor in smaller.items()} == shapes
            gone = block.size - sum(tensor.numel() for tensor in smaller.values())
            assert gone == space_parameters(block, {space: 1}) > 0


def test_llama_7b_and_its_neighbours_lose_what_was_published() -> None:
    """Parameter counts of structured-baselines, section 2.0, from configurations alone."""
    from transformers import LlamaConfig

    def left(config: LlamaConfig, blocks: range, heads: int, kv_heads: int, channels: int) -> int:
        anatomy = resolve(config)
        less = {"heads": heads, "kv_heads": kv_heads, "ffn": channels}
        return anatomy.parameters - sum(space_parameters(anatomy.blocks[i], less) for i in blocks)

    llama = LlamaConfig()
    assert left(llama, range(4, 30), 8, 8, 2752) == 5_422_977_024
    llama3 = LlamaConfig(
        vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, num_hidden_layers=32
    )
    assert left(llama3, range(4, 30), 8, 2, 3584) == 6_612_586_496
    tiny = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    assert left(tiny, range(4, 18), 8, 1, 1408) == 945_907_712


PERMUTABLE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "olmo2",
    "granite",
    "gpt2",
    "opt",
    "gpt_neox",
]


@pytest.mark.parametrize("family", PERMUTABLE)
def test_the_order_of_the_residual_stream_is_nobodys_business(family: str) -> None:
    """Permuting `hidden` everywhere, inside the blocks and outside, leaves the logits alone."""
    model, ids = tiny_model(family), torch.arange(1, 25).view(2, 12)
    before = model(ids).logits
    anatomy = resolve(model.config)
    order = torch.randperm(anatomy.spaces["hidden"], generator=torch.Generator().manual_seed(0))
    kept = dict.fromkeys(residual_spaces(anatomy), order)
    state = model.state_dict()
    outer = cut_outer(anatomy, {name: state[name] for name in (*anatomy.outer, *anatomy.tied)}, kept)
    blocks = {
        f"{block.prefix}.{name}": tensor
        for block in anatomy.blocks
        for name, tensor in cut_block(
            block, dict(model.get_submodule(block.prefix).state_dict()), kept
        ).items()
    }
    with torch.no_grad():
        model.load_state_dict({**outer, **blocks})
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_what_is_known_outside_the_blocks_is_what_the_shapes_say() -> None:
    for family in PERMUTABLE:
        anatomy = resolve(tiny_model(family).config)
        assert anatomy.outer_axes.keys() == anatomy.outer.keys()
        for name, axes in anatomy.outer_axes.items():
            assert tuple(axis.size for axis in axes) == anatomy.outer[name]
