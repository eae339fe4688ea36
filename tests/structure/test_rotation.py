"""Slicing in closed form: rotations change nothing, slices are projections, what is lost is the tail."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import secateur  # noqa: F401 registers the model type
from secateur.anatomy.resolve import resolve
from secateur.anatomy.sliced import require_sliceable, sliced_size
from secateur.core.errors import AnatomyError
from secateur.pipeline.ways.slices import _Bridge, _projected
from secateur.structure.rotation import Bases, lost_energy, rotate_block, turned
from secateur.structure.slicegpt import SliceGPT

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite"]
IDS = torch.arange(1, 25).view(2, 12)


def orthonormal(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0][:, :count]


def bases_of(dense: Any, count: int) -> list[Tensor]:
    """One basis a place; the last place keeps the old one."""
    size, places = dense.config.hidden_size, 2 * dense.config.num_hidden_layers
    return [*(orthonormal(size, count, seed) for seed in range(places)), torch.eye(size, dtype=torch.float64)]


def rotated(dense: Any, bases: Sequence[Tensor]) -> Any:
    """The dense model written in these bases, through the class that loads such files."""
    anatomy, count = resolve(dense.config), bases[0].shape[1]
    sizes = {
        str(block.index): {"hidden_size": count, "output_size": bases[2 * block.index + 2].shape[1]}
        for block in anatomy.blocks
    }
    kind = dense.config.model_type
    config = {
        **dense.config.to_dict(),
        "model_type": "secateur",
        "base_model_type": kind,
        "per_layer_config": sizes,
        "residual_shortcuts": True,
        "tie_word_embeddings": False,
        "head_dim": anatomy.spaces["head_dim"],
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["secateur"].from_dict(config), dtype=dense.dtype)
    state = {name: dense.state_dict()[name] for name in (*anatomy.outer, *anatomy.tied)}
    embedding = f"{anatomy.embedding}.weight"
    state[embedding] = (state[embedding].double() @ bases[0]).to(dense.dtype)
    for block in anatomy.blocks:
        at = 2 * block.index
        own = dict(dense.get_submodule(block.prefix).state_dict())
        new = rotate_block(block, anatomy.norms, own, Bases(*bases[at : at + 3]))
        state |= {f"{block.prefix}.{name}": tensor for name, tensor in new.items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_rotation_leaves_the_logits_alone(family: str) -> None:
    dense = tiny_model(family)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


def test_in_float64_to_ten_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama", dtype=torch.float64)

    def exact(norm: Any, hidden: Tensor) -> Tensor:
        return norm.weight * hidden / (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    monkeypatch.setattr(type(dense.model.norm), "forward", exact)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_a_projection_at_every_place_of_the_dense_model(family: str) -> None:
    """The walk runs dense blocks with projections: the very model that is written."""
    dense = tiny_model(family)
    bases = bases_of(dense, 40)
    sliced = rotated(dense, bases)(IDS).logits
    assert not torch.allclose(sliced, dense(IDS).logits, atol=1e-2)
    anatomy = resolve(dense.config)
    with ExitStack() as stack:
        for block in anatomy.blocks:
            module = dense.get_submodule(block.prefix)
            bridge = _Bridge(module, list(anatomy.norms)[1], bases[2 * block.index])
            bridge.cross_in(bases[2 * block.index + 1])
            stack.enter_context(bridge.installed())
        torch.testing.assert_close(dense(IDS).logits, sliced, rtol=1e-4, atol=1e-4)


def test_lost_energy_is_the_squared_error_and_the_tail_of_the_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    rows *= torch.linspace(0.1, 2, 24, dtype=torch.float64)
    covariance = rows.T @ rows
    basis = SliceGPT().directions(covariance)[:, :16]
    error = float((rows - _projected(rows, basis)).square().sum())
    values = torch.linalg.eigvalsh(covariance)
    assert error == pytest.approx(float(values[:8].sum()), rel=1e-9)
    assert lost_energy(covariance, basis) == pytest.approx(error / float(rows.square().sum()), rel=1e-9)
    for seed in range(5):
        assert lost_energy(covariance, orthonormal(24, 16, seed)) > lost_energy(covariance, basis)


def test_turning_keeps_the_subspace() -> None:
    basis = orthonormal(24, 10, 0)
    other = turned(basis, torch.Generator().manual_seed(1))
    torch.testing.assert_close(other @ other.T, basis @ basis.T)
    torch.testing.assert_close(other.T @ other, torch.eye(10, dtype=torch.float64))
    assert not torch.allclose(other, basis)
    mirrored = turned(basis.flip(1) * -1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(mirrored, other)


def test_counts_are_the_closed_form() -> None:
    config = tiny_config("llama", num_hidden_layers=3)
    anatomy, width, wide = resolve(config), 40, config.hidden_size
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = (2 * heads + 2 * groups) * size * width + 3 * config.intermediate_size * width + 2 * width**2
    last = (config.intermediate_size + width) * (wide - width)
    assert sliced_size(anatomy, width, width) == 3 * block
    assert sliced_size(anatomy, width, wide) == 3 * block + last


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt2", "gpt_neox", "mixtral"])
def test_other_kinds_of_blocks_are_refused(family: str) -> None:
    with pytest.raises(AnatomyError, match="added to the residual stream"):
        require_sliceable(resolve(tiny_config(family)))
