"""Blocks without attention or feed-forward part: what is left computes what a silenced part would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, UNLISTED, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.family import load_family
from secateur.anatomy.parts import part_sizes, parts_of, without
from secateur.anatomy.resolve import resolve
from secateur.anatomy.shorter import shorter_config
from secateur.core.errors import AnatomyError

IDS = torch.arange(1, 25).view(2, 12)
SKIPS = {0: ["self_attn"], 1: ["mlp"], 2: ["self_attn"]}
WRITERS = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2")


def three_blocks(family: str) -> PreTrainedModel:
    return tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})


def silence(model: PreTrainedModel) -> None:
    """Zero whatever the parts that are skipped write into the residual stream."""
    parts, blocks = parts_of(model.config), resolve(model.config).blocks
    for index, lost in SKIPS.items():
        for name, parameter in model.get_submodule(blocks[index].prefix).named_parameters():
            modules = [m for part in lost for m, gives in parts[part].items() if gives != "input"]
            inside = any(name.startswith(module + ".") for module in modules)
            if inside and any(word in WRITERS or word.endswith("down_proj_bias") for word in name.split(".")):
                parameter.data.zero_()


def skipping(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in the class that leaves the parts out."""
    config = model.config.to_dict()
    updates, _ = shorter_config(config, resolve(model.config), list(range(3)), SKIPS, parts_of(model.config))
    made = CONFIG_MAPPING["secateur"].from_dict({**config, **updates})
    small = AutoModelForCausalLM.from_config(made).eval()
    tensors = model.state_dict()
    small.load_state_dict({name: tensors[name] for name in small.state_dict()})
    return small


def generate(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # padded on the left
    return model.generate(IDS, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_parts_are_silenced_ones_with_and_without_a_cache(family: str) -> None:
    model = three_blocks(family)
    small = skipping(model)
    assert small.num_parameters() < model.num_parameters()
    silence(model)
    with torch.no_grad():
        assert torch.equal(small(IDS).logits, model(IDS).logits)
    expected = generate(model, use_cache=False)
    assert torch.equal(generate(small, use_cache=True), expected)
    assert torch.equal(generate(small, use_cache=False), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_cache_counts_tokens_where_the_first_attention_is_gone(family: str) -> None:
    small = skipping(three_blocks(family))
    with torch.no_grad():
        cache = small(IDS, use_cache=True).past_key_values
        assert [cache.get_seq_length(layer) for layer in range(3)] == [12] * 3
        assert cache.layers[0].keys.numel() == IDS.numel()  # one number a token
        static = StaticCache(config=small.config, max_cache_len=64)
        small(IDS, past_key_values=static)
        following = torch.full((2, 1), 7)
        stepwise = small(following, past_key_values=static).logits[:, -1]
        at_once = small(torch.cat([IDS, following], 1)).logits[:, -1]
    torch.testing.assert_close(stepwise, at_once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_make_up_the_whole_block(family: str) -> None:
    config = tiny_config(family)
    for block in resolve(config).blocks:
        assert sum(part_sizes(block, parts_of(config)).values()) == block.size


def test_parts_are_put_back() -> None:
    model = tiny_model("llama")
    parts, block = parts_of(model.config), model.model.layers[0]
    before = dict(block.named_modules())
    with without(block, parts["self_attn"], 0):
        assert "self_attn.q_proj" not in dict(block.named_modules())
    assert {name: id(module) for name, module in block.named_modules()} == {
        name: id(module) for name, module in before.items()
    }


@pytest.mark.parametrize("family", UNLISTED)
def test_a_family_whose_parts_are_not_known_is_refused(family: str) -> None:
    with pytest.raises(AnatomyError, match="whole blocks"):
        parts_of(tiny_config(family))


def test_a_norm_behind_the_residual_is_refused() -> None:
    assert load_family("opt")
    with pytest.raises(AnatomyError, match="do_layer_norm_before"):
        parts_of(tiny_config("opt", do_layer_norm_before=False))
