"""Packed layers and models: when the kernel computes, and that a model says the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.runtime import compiled, facts
from secateur.runtime.packed_linear import PackedLinear

from .matrices import linear_of, sparse, two_of_four


@pytest.mark.parametrize(
    ("format", "budget"), [("bitmask", {"sparsity": 0.5}), ("nm", {"pattern": "2:4"})], ids=["half", "2:4"]
)
def test_same_tokens_as_the_dense_model(
    format: str, budget: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    secateur.prune(
        "seedling", tmp_path / "packed", method="magnitude", format=format, evaluation_windows=0,
        measure_speed=False, check_loading=False, **budget,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    how = secateur.SecateurQuantizationConfig(mode="packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder has a configuration of its own
        kept = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", dtype=torch.float32, quantization_config=how
        )
    prompts = torch.arange(36).view(3, 12) + 5  # 36 rows unpack, the 3 of a step do not
    told = [model.generate(prompts, max_new_tokens=40, do_sample=False) for model in (dense, kept)]
    assert told[0].equal(told[1])
    assert set(computed) == {36, 3}
    assert len(computed) == 40 * 42  # every packed layer, every step


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_kernel_computes_in_float32_and_the_dtype_of_the_file(
    stored: torch.dtype, computed: list[int]
) -> None:
    weight = sparse(20, 30, 0.5, stored)
    for dtype in (torch.float32, stored):
        layer, x = linear_of(weight, dtype=dtype), torch.ones(2, 3, 30, dtype=dtype)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight.to(dtype)))
    assert computed == [6, 6]


def test_where_the_weight_is_unpacked(computed: list[int]) -> None:
    """Other dtypes, gradients, autocast, and patterns that the kernel does not know."""
    half, x = sparse(20, 32, 0.5, torch.float16), torch.randn(2, 32)
    cast = linear_of(half, dtype=torch.bfloat16)
    assert cast(x.bfloat16()).equal(torch.nn.functional.linear(x.bfloat16(), half.bfloat16()))
    layer, wide = linear_of(half, dtype=torch.float32), half.float()
    tracked = x.clone().requires_grad_()
    layer(tracked).sum().backward()
    torch.testing.assert_close(tracked.grad, wide.sum(0).expand(2, -1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    full = sparse(4, 10, 0.0, torch.float32)
    assert linear_of(full)(x[:, :10]).equal(torch.nn.functional.linear(x[:, :10], full))
    for odd in (two_of_four(4, 20, torch.bfloat16), two_of_four(4, 32, torch.bfloat16).repeat(1, 1)[:, ::2]):
        odd = odd.contiguous()
        layer = linear_of(odd, "nm")
        assert compiled.matrix_of(layer, "nm", layer.parts) is None
        inputs = torch.ones(1, odd.shape[1], dtype=odd.dtype)
        assert layer(inputs).equal(torch.nn.functional.linear(inputs, odd))
    assert computed == []


def test_new_parts_are_noticed(computed: list[int]) -> None:
    weight = sparse(20, 32, 0.5, torch.bfloat16)
    layer, x = linear_of(weight), torch.ones(1, 32, dtype=torch.bfloat16)
    before = layer(x)
    layer.packed_values = layer.packed_values * 2
    assert layer(x).equal(before * 2)
    assert len(computed) == 2


def test_what_a_model_takes() -> None:
    layer = linear_of(sparse(40, 64, 0.5, torch.bfloat16))
    model = torch.nn.Sequential(layer, torch.nn.Linear(40, 4, bias=False))
    model.append(model[1])
    assert isinstance(layer, PackedLinear)
    assert facts.weight_bytes(model) == layer.packed_bytes + 40 * 4 * 4
    assert facts.kernel_of(model[1]) is None
    assert facts.kernel_of(model) is not None
