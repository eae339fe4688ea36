"""Decoders without a family file: understood by looking and running, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, UNLISTED, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.stablelm import modeling_stablelm

from secateur.anatomy.infer import infer
from secateur.anatomy.model import Anatomy, Block
from secateur.anatomy.resolve import resolve
from secateur.anatomy.skeleton import build_meta
from secateur.core.errors import AnatomyError

DENSE = [name for name in FAMILIES if "moe" not in name and name not in ("mixtral", "gpt_oss", "deepseek_v3")]


def sites_of(block: Block) -> list[list[tuple[Any, ...]]]:
    """Matrices grouped by what they read, without the names of the groups."""
    groups = [[(m.name, m.shape, m.transposed) for m in block.readers(site)] for site in block.sites]
    return sorted(sorted(group) for group in groups)


def inferred(family: str, **changes: Any) -> Anatomy:
    """As if there were no family file."""
    config = tiny_config(family, **changes)
    if family == "gpt_neox":  # its config class says is_decoder: false, as those of encoders do
        config.architectures = ["GPTNeoXForCausalLM"]
    return infer(config, build_meta(config))


@pytest.mark.parametrize("family", DENSE)
def test_inference_agrees_with_the_family_file(family: str) -> None:
    found, known = inferred(family), resolve(tiny_config(family))
    assert [sites_of(block) for block in found.blocks] == [sites_of(block) for block in known.blocks]
    for name in (
        "blocks_path",
        "base_prefix",
        "outer",
        "embedding",
        "norm",
        "head",
        "tied",
        "prunable_parameters",
    ):
        assert getattr(found, name) == getattr(known, name), name
    assert found.inferred
    assert not known.inferred


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("stablelm", [3, 1, 2, 1]),
        ("starcoder2", [3, 1, 1, 1]),
        ("phi", [4, 1, 1]),  # attention and mlp side by side: q, k, v and fc1 read one tensor
        ("cohere", [5, 1, 1]),
        ("falcon", [2, 1, 1]),
    ],
)
def test_unlisted_families(family: str, sites: list[int]) -> None:
    model = tiny_model(family)
    anatomy = resolve(model.config, model)
    assert anatomy.inferred
    assert len(anatomy.blocks) == 2
    for block in anatomy.blocks:
        assert sorted(len(block.readers(site)) for site in block.sites) == sorted(sites)
        parameters = dict(model.get_submodule(block.prefix).named_parameters())
        assert sum(m.view(parameters).numel() for m in block.matrices) == block.prunable_parameters


def test_unlisted_families_are_all_tried() -> None:
    assert set(UNLISTED) == {"stablelm", "starcoder2", "phi", "cohere", "falcon"}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mixtral", r"mlp\.experts\.gate_up_proj of shape \(4, 192, 64\) may hold experts"),
        ("gpt_oss", "may hold experts"),
    ],
)
def test_experts_in_one_parameter_are_refused(family: str, message: str) -> None:
    with pytest.raises(AnatomyError, match=f"{message}.*add a model family"):
        inferred(family)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {}, "not known to be a decoder: its config says is_decoder: false"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "its files are of a BertForMaskedLM"),
        ("roberta", {"architectures": ["RobertaForCausalLM"]}, "looks both ways"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("gemma3", {}, "multi-modal"),
        ("vit", {}, "knows no causal language model of type 'vit'"),
        ("albert", {}, "knows no causal language model of type 'albert'"),
        ("xlm", {"n_layers": 2}, "several: transformer.attentions"),
        ("jamba", {"num_hidden_layers": 8}, "it has none; expected one list of 8 blocks of one class"),
    ],
)
def test_what_is_not_understood_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AnatomyError, match=message) as caught:
        resolve(AutoConfig.for_model(model_type, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.down_proj(self.up_proj(x)), r"mlp\.gate_proj ran 0 times"),
        (
            lambda self, x: self.down_proj(self.gate_proj(x) * self.up_proj(self.up_proj(x)[..., :64])),
            "ran 2 times",
        ),
        (lambda self, x: self.down_proj(self.up_proj(x) * x.sum().item()), "does not run without weights"),
    ],
)
def test_what_a_forward_gives_away(
    forward: Callable[[Any, Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_stablelm.StableLmMLP, "forward", forward)
    with pytest.raises(AnatomyError, match=message):
        inferred("stablelm")


def test_a_matrix_outside_the_blocks_is_refused() -> None:
    config = tiny_config("stablelm")
    model = build_meta(config)
    model.model.project_in = nn.Linear(64, 64, device="meta")
    with pytest.raises(AnatomyError, match=r"model\.project_in is a matrix outside its blocks"):
        infer(config, model)


def test_blocks_that_share_parameters_are_refused() -> None:
    config = tiny_config("stablelm")
    model = build_meta(config)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(AnatomyError, match=r"layers\.1\.mlp\.gate_proj\.weight is the same parameter as"):
        infer(config, model)


def test_blocks_made_of_something_else_are_refused() -> None:
    config = tiny_config("stablelm")
    model = build_meta(config)
    for layer in model.model.layers:
        layer.memory = nn.Parameter(torch.empty(500, 500, device="meta"))
    with pytest.raises(AnatomyError, match=r"of a block are in nn\.Linear modules"):
        infer(config, model)
