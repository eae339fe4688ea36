"""Factors in files: what is read back is their product, packed or not, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import interrupted, prune, same_bytes
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.core.errors import CheckpointError, InputError, RecipeError
from secateur.core.factored import Factored
from secateur.core.pattern import Pattern
from secateur.core.selection import select
from secateur.loading.quantizer import SecateurQuantizationConfig
from secateur.pipeline.opened import open_model
from secateur.report.verdict import verdict
from secateur.runtime import compiled
from secateur.runtime.build import library, why_missing
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.armor import FactoredFormat, packed
from secateur.storage.bitmask import Bitmask
from secateur.storage.formats import Packed
from secateur.storage.nm import GroupsOfM

IDS = torch.arange(5, 45).view(2, 20)
OPTIONS = {"block": 8, "iterations": 3, "store": "factors"}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def factored(pattern: str) -> Factored:
    core = draw(12, 16)
    kept = select(core.abs(), Pattern.parse(pattern), 0.5)
    return Factored(draw(3, 4, 4), core * kept, draw(2, 8, 8) + torch.eye(8))


def load(folder: Path, mode: str) -> PreTrainedModel:
    how = SecateurQuantizationConfig(mode=mode)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "matrix"])
def test_the_product_comes_back(pattern: str) -> None:
    factors = factored(pattern)
    one = packed(factors, torch.float32, Pattern.parse(pattern))
    expected = torch.block_diag(*factors.left) @ factors.core @ torch.block_diag(*factors.right)
    torch.testing.assert_close(one.unpack(), expected)
    again = Packed.read("w", "armor", one.stored("w"))
    assert torch.equal(again.unpack(), one.unpack())


def test_bytes_are_those_of_core_and_blocks() -> None:
    one = packed(factored("2:4"), torch.bfloat16, Pattern.parse("2:4"))
    assert one.nbytes == 12 * 16 // 2 * 2 + 12 * 16 // 2 * 2 // 8 + 2 * (3 * 16 + 2 * 64)


@pytest.mark.parametrize("pattern", ["2:4", "matrix"])
def test_a_packed_layer_multiplies_one_after_the_other(pattern: str) -> None:
    one = packed(factored(pattern), torch.float32, Pattern.parse(pattern))
    bias = torch.nn.Parameter(draw(12))
    layer, inputs = PackedLinear(one, torch.empty(1), bias), draw(2, 5, 16)
    expected = torch.nn.functional.linear(inputs, one.unpack(), bias)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "matrix"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_the_kernel_multiplies_by_the_core_as_it_lies_there(
    rows: int, stored: torch.dtype, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums as with S unpacked, in another order."""
    if library() is None:
        pytest.skip(why_missing() or "no kernel")
    layer = PackedLinear(packed(factored(pattern), stored, Pattern.parse(pattern)), torch.empty(1))
    inputs, unpacked = draw(rows, 16), []
    real = Bitmask.unpack if pattern == "matrix" else GroupsOfM.unpack
    for format in (Bitmask, GroupsOfM):
        monkeypatch.setattr(format, "unpack", lambda *inner: unpacked.append(inner) or real(*inner))
    found = layer(inputs)
    assert not unpacked
    monkeypatch.setattr(compiled, "library", lambda: None)
    torch.testing.assert_close(found, layer(inputs), rtol=1e-5, atol=1e-5)
    assert len(unpacked) == 1


def test_a_core_that_the_kernel_does_not_know_is_unpacked() -> None:
    layer = PackedLinear(packed(factored("3:8"), torch.bfloat16, Pattern.parse("3:8")), torch.empty(1))
    inputs, parts = draw(3, 16), layer.parts
    core = GroupsOfM.unpack(
        {"values": parts["core_values"], "indices": parts["core_indices"]}, (12, 16), torch.float32
    )
    expected = inputs @ torch.block_diag(*parts["right"].float()).T @ core.T
    torch.testing.assert_close(layer(inputs), expected @ torch.block_diag(*parts["left"].float()).T)


@pytest.mark.parametrize("part", ["left", "right", "core_values", "core_indices"])
def test_parts_that_do_not_fit_are_refused_by_name(part: str) -> None:
    one = packed(factored("2:4"), torch.float32, Pattern.parse("2:4"))
    parts = dict(one.parts)
    parts[part] = parts[part][:-1]
    with pytest.raises(CheckpointError, match="'w'"):
        FactoredFormat.check(parts, "w", one.shape)
    if part.startswith("core"):
        del parts[part]
        with pytest.raises(CheckpointError, match=f"{part} is missing"):
            FactoredFormat.check(parts, "w", one.shape)


def test_a_matrix_alone_has_no_factors() -> None:
    with pytest.raises(InputError, match="store=factors"):
        FactoredFormat.pack(draw(4, 4))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_run_writes_factors_that_load_and_export(pattern: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=torch.float16)
    report = prune(model, tmp_path / "out", method="armor", pattern=pattern, sparsity=0.5, options=OPTIONS)
    formats = open_model(tmp_path / "out").checkpoint.formats
    assert set(formats.values()) == {"armor"}
    assert len(formats) == len(report.layers)
    dense, small = load(tmp_path / "out", "dense"), load(tmp_path / "out", "packed")
    assert any(isinstance(module, PackedLinear) for module in small.modules())
    with torch.no_grad():
        # the dense product is rounded to float16, the factors one by one
        torch.testing.assert_close(small(IDS).logits, dense(IDS).logits, rtol=2e-3, atol=5e-3)
    secateur.export(tmp_path / "out", tmp_path / "plain", format="dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]), name


def test_a_product_is_not_called_sparse(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    options = {**OPTIONS, "store": "dense"}
    report = prune(model, tmp_path / "out", method="armor", pattern="2:4", options=options)
    assert report.sparsity == pytest.approx(0.5)
    assert report.nonzero_parameters_after == report.parameters_before
    assert report.bytes_after == report.bytes_before
    assert "no zeros" in report.effect
    assert "product that has no zeros" in verdict(report)
    assert not open_model(tmp_path / "out").checkpoint.formats


def test_transposed_matrices_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"c_attn.*store=factors"):
        prune(model, tmp_path / "out", method="armor", pattern="2:4", options=OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("store", "advice"), [("dense", "store=factors"), ("factors", "packed anyway")])
def test_a_format_of_zeros_is_refused(store: str, advice: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    options = {**OPTIONS, "store": store}
    with pytest.raises(RecipeError, match=advice):
        prune(model, tmp_path / "out", method="armor", pattern="2:4", options=options, format="bitmask")
    assert not (tmp_path / "out").exists()


def test_a_killed_run_ends_in_the_same_files(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    settings = {"method": "armor", "pattern": "2:4", "options": OPTIONS}
    prune(model, tmp_path / "whole", **settings)
    with interrupted(1):
        prune(model, tmp_path / "again", **settings)
    prune(model, tmp_path / "again", resume=True, **settings)
    assert same_bytes(tmp_path / "whole", tmp_path / "again")
