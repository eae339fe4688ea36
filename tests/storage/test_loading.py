"""`from_pretrained` of packed folders, unpacked or kept packed, says what the dense model says."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import secateur
from formats.cut_models import save_cut
from secateur.core.errors import CheckpointError, InputError
from secateur.evaluation import _reopen
from secateur.runtime import packed_linear
from secateur.runtime.packed_linear import PackedLinear, unpack_and_multiply

from .models import IDS, save_packed, save_sparse, stored

FAMILIES = ["llama", "qwen3", "gpt2", "mixtral", "gpt_oss", "phi3", "deepseek_v3", "opt"]
"""Separate and tied heads, transposed matrices, experts stored one by one and fused, fused projections."""


def load(folder: Path, mode: str = "", **more: Any) -> Any:
    if mode:
        more["quantization_config"] = secateur.SecateurQuantizationConfig(mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the folder has a configuration of its own
        return AutoModelForCausalLM.from_pretrained(folder, **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS % model.config.vocab_size).logits
    return found


def packed_modules(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return save_sparse("llama", folder / "dense"), save_packed(folder / "dense", folder / "packed")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits(family: str, tmp_path: Path) -> None:
    dense = save_sparse(family, tmp_path / "dense")
    packed = save_packed(dense, tmp_path / "packed")
    assert len(list(packed.glob("*.safetensors"))) >= 1
    expected = logits(load(dense))
    model, info = load(packed, output_loading_info=True)
    assert not any(info.values()), info
    assert not packed_modules(model)
    assert logits(model).equal(expected)
    assert logits(load(packed, "packed")).equal(expected)


def test_two_of_four(tmp_path: Path) -> None:
    secateur.prune(
        "seedling", tmp_path / "packed", method="magnitude", pattern="2:4", format="nm",
        evaluation_windows=0, measure_speed=False, check_loading=False,
    )  # fmt: skip
    secateur.export(tmp_path / "packed", tmp_path / "dense", format="dense")
    model = load(tmp_path / "packed", "packed")
    assert {module.format for module in packed_modules(model)} == {"nm"}
    found, expected = logits(model), logits(load(tmp_path / "dense"))
    assert found.dtype == torch.float16  # products may be summed in another order, and rounded otherwise
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)


def test_transposed_matrices_stay_packed_in_two_of_four(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model", dtype=torch.bfloat16)
    secateur.prune(
        model, tmp_path / "packed", method="magnitude", pattern="2:4", format="nm",
        evaluation_windows=0, measure_speed=False, check_loading=False,
    )  # fmt: skip
    kept = load(tmp_path / "packed", "packed", dtype=torch.float32)
    linears = packed_modules(kept)
    assert len(linears) == 8
    assert all(linear.format == "nm" and linear.bias is not None for linear in linears)
    one = kept.transformer.h[0].mlp.c_fc
    assert (one.in_features, one.out_features) == (64, 256)
    dense = load(tmp_path / "packed", dtype=torch.float32)
    tokens = [found.generate(IDS[:, :8], max_new_tokens=24, do_sample=False) for found in (dense, kept)]
    assert tokens[0].equal(tokens[1])


def test_shards(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Parts that lie in several files."""
    from secateur.checkpoint.reader import Checkpoint
    from secateur.checkpoint.writer import CheckpointWriter
    from secateur.storage.packer import Packer

    source = Checkpoint.open(llama[0])
    with CheckpointWriter(tmp_path / "sharded", source, {}, pack=Packer("bitmask")) as writer:
        writer.write("all", source.read(source.tensors), {})
        writer.assemble(shard_bytes=20_000)
        writer.finish()
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 4
    assert logits(load(tmp_path / "sharded")).equal(logits(load(llama[0])))


def test_blocks_of_unequal_sizes(tmp_path: Path) -> None:
    cut = save_cut("llama", tmp_path)
    sparse = tmp_path / "sparse"
    secateur.prune(
        cut, sparse, method="magnitude", sparsity=0.6, format="bitmask", evaluation_windows=0,
        measure_speed=False, check_loading=False,
    )  # fmt: skip
    secateur.export(sparse, tmp_path / "dense", format="dense")
    assert load(sparse).config.model_type == "secateur"
    expected = logits(load(tmp_path / "dense"))
    assert logits(load(sparse)).equal(expected)
    kept = load(sparse, "packed")
    assert packed_modules(kept)
    assert logits(kept).equal(expected)


def test_other_dtypes(llama: tuple[Path, Path]) -> None:
    """The cast is that of the stock loader."""
    dense, packed = llama
    for mode in ("dense", "packed"):
        model = load(packed, mode, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert logits(model).equal(logits(load(dense, dtype=torch.bfloat16)))
    moved = load(packed, "packed").to(torch.float64)
    assert logits(moved).equal(logits(load(dense).to(torch.float64)))


def test_dense_is_an_ordinary_model(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(llama[1])
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    saved, source = stored(tmp_path / "saved"), stored(llama[0])
    assert saved.keys() == source.keys()
    assert all(saved[name].equal(tensor) for name, tensor in source.items())
    model(IDS).logits.sum().backward()  # and can be trained
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_packed_stays_small(llama: tuple[Path, Path]) -> None:
    dense, packed = load(llama[0]), load(llama[1], "packed")
    kept = packed_modules(packed)
    assert {type(module) for module in packed.model.layers[0].mlp.children()} >= {PackedLinear}
    assert len(kept) == 15  # seven of each block, and the head
    whole = sum(module.in_features * module.out_features * 4 for module in kept)
    assert sum(module.packed_bytes for module in kept) < 0.35 * whole
    assert (
        sum(p.nbytes for p in packed.parameters()) < sum(p.nbytes for p in dense.parameters()) - 0.9 * whole
    )
    assert packed.is_quantized
    with pytest.raises(ValueError, match="not serializable"):
        packed.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


def test_a_kernel_takes_over(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load(llama[1], "packed"), []

    def kernel(linear: PackedLinear, inputs: Tensor) -> Tensor:
        seen.append(set(linear.parts))
        return unpack_and_multiply(linear, inputs)

    expected = logits(model)
    monkeypatch.setitem(packed_linear.KERNELS, "bitmask", kernel)
    assert logits(model).equal(expected)
    assert seen == [{"mask", "values"}] * 15


def test_gradients_pass_through_packed_layers(llama: tuple[Path, Path]) -> None:
    inputs = {mode: load(llama[1], mode).get_input_embeddings() for mode in ("dense", "packed")}
    gradients = []
    for mode in inputs:
        model = load(llama[1], mode)
        model(IDS).logits.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].equal(gradients[1])


def test_the_base_model_alone(llama: tuple[Path, Path]) -> None:
    dense, packed = (AutoModel.from_pretrained(folder) for folder in llama)
    with torch.no_grad():
        assert packed(IDS).last_hidden_state.equal(dense(IDS).last_hidden_state)


def test_shapes_are_checked_without_loading(llama: tuple[Path, Path]) -> None:
    """What is asked of models too large to be tried: stand-ins have the shapes of what they stand for."""
    assert _reopen.main(str(llama[1]), False, False, True) == {"class": "LlamaForCausalLM", "problem": ""}


def test_mode_by_the_config(llama: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(llama[1])
    config.quantization_config["mode"] = "packed"
    assert packed_modules(load(llama[1], config=config))


def test_refusals(llama: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="mode 'small'; expected dense or packed"):
        secateur.SecateurQuantizationConfig(mode="small")
    with pytest.raises(CheckpointError, match="layout version 2"):
        secateur.SecateurQuantizationConfig(version=2)
    with pytest.raises(InputError, match="offloads to the CPU or the disk"):
        load(llama[1], device_map={"model": "cpu", "lm_head": "disk"})


ALONE = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
FRESH = """
import sys
import secateur, torch
from transformers import AutoModelForCausalLM
dense, packed = sys.argv[1:]
ids = torch.arange(24)[None]
how = secateur.SecateurQuantizationConfig(mode="packed")
with torch.no_grad():
    one, two = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (dense, packed))
    three = AutoModelForCausalLM.from_pretrained(packed, quantization_config=how)(ids).logits
assert one.equal(two) and one.equal(three)
"""


def in_fresh_process(source: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_in_a_fresh_process(llama: tuple[Path, Path]) -> None:
    done = in_fresh_process(FRESH, *llama)
    assert done.returncode == 0, done.stderr


def test_transformers_alone_refuses(llama: tuple[Path, Path]) -> None:
    """It must not start from random weights, which it does with quantized weights that it does not know, and
    it says whose they are."""
    done = in_fresh_process(ALONE, llama[1])
    assert done.returncode != 0
    assert "Unknown quantization type, got secateur" in done.stderr
    assert "mismatched" in done.stderr.lower()


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="'mod'; expected mode"):
        secateur.SecateurQuantizationConfig(mod="packed")


def test_state_dict_of_a_packed_model_has_its_weights(tmp_path: Path) -> None:
    packed = save_packed(save_sparse("llama", tmp_path / "model"), tmp_path / "packed")
    model = load(packed, "packed", dtype=torch.float32)
    state = model.state_dict()
    assert any(name.endswith("packed_values") for name in state)
    other = load(packed, "packed", dtype=torch.float32)
    for module in other.modules():
        if isinstance(module, PackedLinear):
            module.parts["values"].zero_()
    other.load_state_dict(state)
    assert logits(other).equal(logits(model))
