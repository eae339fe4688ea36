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
from secateur.anatomy.resized import resized_config
from secateur.anatomy.resolve import resolve
from secateur.anatomy.sliced import FLAG, sliced_flag, sliced_shapes, sliced_size
from secateur.anatomy.stream import stream_of
from secateur.core.errors import AnatomyError
from secateur.pipeline.ways.slices import _Bridge, _projected
from secateur.structure.rotation import lost_energy, rotate_block, turned, written_in
from secateur.structure.slicegpt import SliceGPT

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gpt2", "opt", "gpt_neox"]
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"use_parallel_residual": False},
    "unbiased": {"enable_bias": False},
    "plain": {"layer_norm_elementwise_affine": False},
    "half-biased": {"attention_bias": False},
}
MODELS = [
    *((family, {}) for family in FAMILIES),
    ("gpt_neox", SETTINGS["sequential"]),
    ("gpt_neox", SETTINGS["half-biased"]),
    ("opt", SETTINGS["unbiased"]),
    ("opt", SETTINGS["plain"]),
]
"""Of LayerNorm with and without weights and biases, in blocks of one step and of two, tied heads and not."""
IDS = torch.arange(1, 25).view(2, 12)


def orthonormal(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0][:, :count]


def bases_of(dense: Any, count: int) -> list[Tensor]:
    """One basis a place; the last place keeps the old one. Where norms subtract the mean, it is in none."""
    size, anatomy = dense.config.hidden_size, resolve(dense.config)
    stream = stream_of(dense.config, anatomy)
    places = len(stream.steps) * len(anatomy.blocks)
    if stream.centred and count < size:
        ones = torch.ones(size, 1, dtype=torch.float64)
        found = (orthonormal(size, count, seed) for seed in range(places))
        bases = [torch.linalg.qr(torch.cat([ones, basis], 1))[0][:, 1:] for basis in found]
        return [*bases, torch.eye(size, dtype=torch.float64)]
    return [*(orthonormal(size, count, seed) for seed in range(places)), torch.eye(size, dtype=torch.float64)]


def rotated(dense: Any, bases: Sequence[Tensor], slice_head: bool = False) -> Any:
    """The dense model written in these bases, through the class that loads such files."""
    anatomy, count = resolve(dense.config), bases[0].shape[1]
    stream = stream_of(dense.config, anatomy)
    step = len(stream.steps)
    sizes = [
        {"stream": count, "output": bases[step * (block.index + 1)].shape[1]} for block in anatomy.blocks
    ]
    shapes = [
        sliced_shapes(stream, block, *own.values()) for block, own in zip(anatomy.blocks, sizes, strict=True)
    ]
    flag = sliced_flag(anatomy, stream, slice_head=slice_head)
    extra = {FLAG: flag, "tie_word_embeddings": False}
    old = dense.config.to_dict()
    biases = stream.new_biases(anatomy.blocks[0])
    config = {**old, **resized_config(old, anatomy, sizes, shapes, biases, extra=extra)}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["secateur"].from_dict(config), dtype=dense.dtype)
    state = {name: dense.state_dict()[name] for name in (*anatomy.outer, *anatomy.tied)}
    for path in stream.embeddings:
        rows = state[f"{path}.weight"].double()
        state[f"{path}.weight"] = (rows @ written_in(bases[0], stream.centred)).to(dense.dtype)
    for block in anatomy.blocks:
        at = step * block.index
        own = dict(dense.get_submodule(block.prefix).state_dict())
        new = rotate_block(block, stream, own, bases[at : at + step + 1])
        state |= {f"{block.prefix}.{name}": tensor for name, tensor in new.items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_any_rotation_leaves_the_logits_alone(family: str, changes: dict[str, Any]) -> None:
    dense = tiny_model(family, **changes)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_the_mean_needs_no_direction(family: str) -> None:
    """One direction less than there are: LayerNorm never saw it."""
    dense = tiny_model(family)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size - 1))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_in_float64_to_ten_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama", dtype=torch.float64)

    def exact(norm: Any, hidden: Tensor) -> Tensor:
        return norm.weight * hidden / (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    monkeypatch.setattr(type(dense.model.norm), "forward", exact)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_layer_norms_in_float64_to_ten_digits(family: str) -> None:
    dense = tiny_model(family, dtype=torch.float64)
    other = rotated(dense, bases_of(dense, dense.config.hidden_size))
    torch.testing.assert_close(other(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_a_slice_is_a_projection_at_every_place_of_the_dense_model(
    family: str, changes: dict[str, Any]
) -> None:
    """The walk runs dense blocks with projections: the very model that is written."""
    dense = tiny_model(family, **changes)
    bases = bases_of(dense, 40)
    sliced = rotated(dense, bases)(IDS).logits
    assert not torch.allclose(sliced, dense(IDS).logits, atol=1e-2)
    anatomy = resolve(dense.config)
    stream = stream_of(dense.config, anatomy)
    with ExitStack() as stack:
        for block in anatomy.blocks:
            module, at = dense.get_submodule(block.prefix), len(stream.steps) * block.index
            between = [step[0][0] for step in stream.steps[1:]]
            bridge = _Bridge(module, between, bases[at])
            if between:
                bridge.cross_in(bases[at + 1])
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
    stream = stream_of(config, anatomy)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = (2 * heads + 2 * groups) * size * width + 3 * config.intermediate_size * width + 2 * width**2
    last = (config.intermediate_size + width) * (wide - width)
    assert sliced_size(anatomy, stream, width, width) == 3 * block
    assert sliced_size(anatomy, stream, width, wide) == 3 * block + last


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),
        ("olmo2", {}),
        ("mixtral", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("gpt2", {"add_cross_attention": True}),
        ("stablelm", {}),
    ],
)
def test_other_kinds_of_blocks_are_refused(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    with pytest.raises(AnatomyError):
        stream_of(config, resolve(config))
