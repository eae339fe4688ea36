"""The scripts that benchmarks compare with: the published procedures and the synthetic checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_script(name: str) -> ModuleType:
    file = BENCHMARKS / f"{name}.py"
    if not file.is_file():
        pytest.skip(f"no {file}: the benchmarks are not part of this copy")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published() -> ModuleType:
    return load_script("published")


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    return load_script("synthetic")


def some_ids() -> torch.Tensor:
    return torch.randint(1, 300, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep_of", [None, (2, 4)])
def test_the_loss_of_sparsegpt_is_that_of_its_weights(published, keep_of):
    """one-shot-baselines, section 6, oracle 2."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    weight = torch.randn(24, 160, generator=generator)
    hessian = 2 * inputs.T @ inputs / 4
    pruned, loss = published.sparsegpt_update(weight, hessian, 0.5, keep_of=keep_of, exact=True)
    change = (weight - pruned).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(160)
    assert loss == pytest.approx(float(0.5 * ((change @ damped) * change).sum()), rel=1e-3)
    assert int((pruned == 0).sum()) == weight.numel() // 2
    without_update = weight * (pruned != 0)
    change = (weight - without_update).double()
    assert loss < float(0.5 * ((change @ damped) * change).sum())


def test_wanda_drops_exactly_half_of_every_row(published):
    model = tiny_model("llama")
    rows = published.published_wanda(model, some_ids(), 0.5)
    assert len(rows) == 2 * 7
    assert {row.sparsity for row in rows} == {0.5}
    kept = (model.model.layers[1].mlp.down_proj.weight != 0).sum(1)
    assert kept.unique().tolist() == [48]


def test_the_published_threshold_drops_more_than_asked(published):
    by_threshold = published.published_magnitude(tiny_model("llama"), 0.5)
    exact = published.published_magnitude(tiny_model("llama"), 0.5, exact=True)
    assert all(a.sparsity > 0.5 == b.sparsity for a, b in zip(by_threshold, exact, strict=True))


def test_the_statistics_of_a_block_come_from_pruned_blocks_before_it(published):
    model, dense, seen = tiny_model("llama"), tiny_model("llama").model.layers[1].self_attn.q_proj, []
    published.published_wanda(model, some_ids(), 0.5)
    pruned = model.model.layers[1].self_attn.q_proj
    pruned.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(some_ids())
    scores = dense.weight.abs() * torch.cat(seen).norm(dim=0)
    expected = torch.ones_like(scores).scatter_(1, scores.argsort(1)[:, :32], 0)
    agreement = ((pruned.weight != 0) == expected.bool()).float().mean()
    assert agreement > 0.999, "all but ties that rounding decides"


@pytest.mark.parametrize("mixture", [{}, {"experts": 5, "visited": 2}])
def test_a_synthetic_checkpoint_is_an_ordinary_one(synthetic, tmp_path, mixture):
    shape = synthetic.Shape(hidden=64, ffn=96, blocks=3, heads=4, kv_heads=2, vocab=400, **mixture)
    synthetic.write_checkpoint(tmp_path / "model", shape, shard_bytes=100_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values())
    assert sum(tensor.numel() for tensor in model.parameters()) == shape.parameters
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Trees, größer than 7 m."
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < len(tokenizer) <= shape.vocab
    assert tokenizer.decode(ids) == text
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_a_synthetic_checkpoint_follows_its_seed_alone(synthetic, tmp_path):
    shape = synthetic.Shape(hidden=32, ffn=48, blocks=1, heads=2, kv_heads=1, vocab=300)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write_checkpoint(tmp_path / name, shape, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(SystemExit, match="not empty"):
        synthetic.write_checkpoint(tmp_path / "a", shape)
