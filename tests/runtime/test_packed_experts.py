"""Experts that stay packed in memory compute what the unpacked ones do, in few bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.loading.quantizer import SecateurQuantizationConfig
from secateur.runtime.packed_experts import PackedExperts
from secateur.storage.low_bit import LowBit

IDS = torch.arange(5, 45).view(2, 20)


def load(folder: Path, mode: str) -> PreTrainedModel:
    how = SecateurQuantizationConfig(mode=mode)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The gardener cut the old branches of the apple tree.\n" * 100, encoding="utf-8")
    return path


def pruned(
    family: str, text: Path, tmp_path: Path, dtype: torch.dtype = torch.float32, **changes: int
) -> Path:
    secateur.prune(
        save_tiny(family, tmp_path / "model", dtype=dtype, **changes),
        tmp_path / "out",
        method="mc-moe",
        options={"bits": 2.0, "group_size": 32, "grid_steps": 0},
        calibration={"source": str(text), "samples": 4, "length": 24},
        evaluation_windows=0,
        measure_speed=False,
    )
    return tmp_path / "out"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_packed_experts_compute_what_unpacked_ones_do(family: str, text: Path, tmp_path: Path) -> None:
    out = pruned(family, text, tmp_path)
    dense, packed = load(out, "dense"), load(out, "packed")
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        expected, found = dense(IDS).logits, packed(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    kept = [module for module in packed.modules() if isinstance(module, PackedExperts)]
    assert kept
    large = [p.shape for module in kept for p in module.parameters() if p.numel() and p.dim() > 2]
    assert not large, "only biases are there"


def test_they_take_the_bytes_of_the_file(text: Path, tmp_path: Path) -> None:
    out = pruned("mixtral", text, tmp_path)
    dense, packed = load(out, "dense"), load(out, "packed")
    kept = next(module for module in packed.modules() if isinstance(module, PackedExperts))
    weights = sum(p.numel() for p in dense.model.layers[0].mlp.experts.parameters())
    assert kept.packed_bytes < weights * (2.0 + 32 / 32 + 0.2) / 8  # and 8 bytes of layout a matrix
    assert nbytes(packed) < 0.5 * nbytes(dense)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_switch_works_on_them(family: str, text: Path, tmp_path: Path) -> None:
    out = pruned(family, text, tmp_path, num_hidden_layers=3)
    results = []
    for mode in ("dense", "packed"):
        model = load(out, mode)
        with secateur.prune_online(model, out, protect=0) as pruner, torch.no_grad():
            results.append((model(IDS).logits, pruner.saved))
    assert results[0][1] == results[1][1] > 0
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3_moe", torch.float32), ("qwen3_moe", torch.bfloat16), ("gpt_oss", torch.float32)],
)
def test_a_token_at_a_time_is_computed_from_the_bytes(
    family: str, dtype: torch.dtype, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the dense files hold the grid rounded to three digits."""
    out = pruned(family, text, tmp_path, dtype)
    dense, packed = load(out, "dense"), load(out, "packed")
    dense.set_experts_implementation("eager")
    prompt, tolerance = IDS[:1], {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        expected = dense(prompt).logits[0, -3:]
        cache = packed(prompt[:, :-3]).past_key_values
        monkeypatch.setattr(LowBit, "unpack", lambda *_: pytest.fail("a weight was unpacked"))
        steps = [packed(token[None, None], past_key_values=cache).logits[0, -1] for token in prompt[0, -3:]]
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 0.0, "atol": 0.02 * float(expected.abs().max())}
    torch.testing.assert_close(torch.stack(steps), expected, **tolerance)


def test_bench_says_what_computes(text: Path, tmp_path: Path) -> None:
    out = pruned("mixtral", text, tmp_path)
    quick = {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}
    dense = secateur.bench(out, against=tmp_path / "model", **quick)
    packed = secateur.bench(out, against=tmp_path / "model", packed=True, **quick)
    assert dense["kernel"].startswith("none, loaded dense")
    assert "from the bytes" in packed["kernel"]
    assert packed["weight_bytes"] < 0.5 * dense["weight_bytes"] == 0.5 * packed["weight_bytes_against"]
    for result in (dense, packed):
        assert {row["model"] for row in result["measurements"]} == {"model", "against"}
        assert all(row["median"] > 0 for row in result["measurements"])
