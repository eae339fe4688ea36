"""A plan promises speed of packed weights only where a kernel computes from them, and says by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

import secateur
from runtime.matrices import kernel_or_skip
from secateur.cli.app import run
from secateur.pipeline.fastest import UNPACKED
from secateur.pipeline.plans import packed_decode
from secateur.pipeline.plans.packed_decode import LEAST, probe, whole_model
from secateur.recipe import Recipe
from secateur.runtime import compiled, facts

HALF: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "format": "bitmask"}
TWO_OF_FOUR: dict[str, Any] = {"method": "magnitude", "pattern": "2:4", "format": "nm"}
KIND = "compiled, AVX2"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with a kernel that is twice as fast; what it was asked for."""
    asked: list[Any] = []

    def twice(*arguments: Any) -> float:
        asked.append(arguments)
        return 2.0

    monkeypatch.setattr(packed_decode, "probe", twice)
    monkeypatch.setattr(packed_decode, "kernel_words", lambda: KIND)
    monkeypatch.setattr(facts, "why_missing", lambda: None)
    return asked


def refuse(*_: Any) -> float:
    raise AssertionError("it was timed")


@pytest.mark.parametrize("settings", [HALF, TWO_OF_FOUR], ids=["half", "2:4"])
def test_what_is_not_packed_takes_as_long_as_before(
    settings: dict[str, Any], given: list[Any], tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    facts = secateur.plan(model, **settings)
    packed = facts["parameters_prunable"]
    dense = 320 * 64 + 4 * 64  # the head, and the norms of two blocks
    expected = (packed + dense) / (packed / 2 + dense)
    assert facts["decode_speedup"] == pytest.approx(expected, abs=0.001)
    assert facts["faster"]
    assert facts["effect"].startswith(f"Kept packed ({KIND}), decoding at batch 1 is estimated at")
    assert f"{expected:.2f} times" in facts["effect"]
    assert "2.00 times as fast" in facts["effect"]
    assert "% less on disk" in facts["effect"]
    ((shape, stored, dtype, recipe, nbytes),) = given
    assert shape in ((96, 64), (64, 96))  # the largest
    assert (stored, dtype, nbytes) == (torch.bfloat16, torch.float32, 2 * packed)
    assert recipe.format == settings["format"]


def test_a_little_faster_is_not_called_faster(given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_decode, "probe", lambda *_: LEAST - 0.01)
    facts = secateur.plan("seedling", **HALF)
    assert not facts["faster"]
    assert 1 < facts["decode_speedup"] < LEAST


def test_whole_model() -> None:
    assert whole_model(2.0, 100, 0) == 2.0
    assert whole_model(2.0, 0, 100) == 1.0
    assert whole_model(0.5, 100, 100) == pytest.approx(2 / 3)


def test_nothing_is_estimated_for_routed_experts(given: list[Any], tmp_path: Path) -> None:
    facts = secateur.plan(save_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16), **HALF)
    assert (facts["faster"], facts["decode_speedup"]) == (False, None)
    assert not given


@pytest.mark.parametrize(
    ("family", "dtype", "settings", "reason"),
    [
        ("llama", torch.float32, HALF, facts.TAKEN),
        ("llama", torch.bfloat16, {**TWO_OF_FOUR, "pattern": "4:8"}, facts.TAKEN),
        ("llama", torch.float16, {**HALF, "dtype": "bfloat16"}, facts.TAKEN),
        ("gpt2", torch.bfloat16, HALF, UNPACKED),
    ],
    ids=["float32", "4:8", "another dtype", "transposed"],
)
def test_no_promise_where_nothing_computes_from_the_weights(
    family: str,
    dtype: torch.dtype,
    settings: dict[str, Any],
    reason: str,
    given: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_decode, "probe", refuse)
    facts = secateur.plan(save_tiny(family, tmp_path / "model", dtype=dtype), **settings)
    assert (facts["faster"], facts["decode_speedup"]) == (False, None)
    assert facts["effect"].startswith(f"No kernel computes from the result: {reason}.")


def test_transposed_matrices_in_two_of_four_are_promised(given: list[Any], tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model", dtype=torch.bfloat16)
    assert secateur.plan(model, **TWO_OF_FOUR)["faster"]


def test_no_promise_without_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packed_decode, "probe", refuse)
    monkeypatch.setattr(facts, "why_missing", lambda: "no C++ compiler")
    flags = ["--method", "magnitude", "--sparsity", "0.5", "--format", "bitmask"]
    assert run(["plan", "seedling", *flags]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "faster no. No kernel computes from the result: no C++ compiler." in told


def test_no_promise_for_dense_files(given: list[Any]) -> None:
    facts = secateur.plan("seedling", method="magnitude", sparsity=0.5)
    assert not facts["faster"]
    assert "not smaller and not faster" in facts["effect"]
    assert given == []


@pytest.mark.parametrize("settings", [HALF, TWO_OF_FOUR, {**TWO_OF_FOUR, "format": "bitmask"}])
def test_the_probe_times_the_kernel(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On matrices that are sparse as asked, as many as the model has, and a dense rival."""
    kernel_or_skip()
    seen: list[tuple[int, int]] = []
    real = compiled.linear

    def watched(kernel: Any, matrix: Any, inputs: Any, bias: Any) -> Any:
        seen.append((matrix.values.numel(), inputs.shape[0]))
        return real(kernel, matrix, inputs, bias)

    monkeypatch.setattr(compiled, "linear", watched)
    recipe = Recipe(model="seedling", **settings)
    gain = probe((64, 256), torch.bfloat16, torch.float32, recipe, 3 * 64 * 256 * 2)
    assert gain > 0
    assert len(seen) == 3 * (packed_decode.REPEATS + 1)
    assert {rows for _, rows in seen} == {1}
    assert all(values == pytest.approx(64 * 256 / 2, rel=0.05) for values, _ in seen)


def test_the_probe_of_a_large_matrix_takes_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_or_skip()
    monkeypatch.setattr(packed_decode, "PROBE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(packed_decode, "STREAM_BYTES", 1 << 14)
    recipe = Recipe(model="seedling", **HALF)
    assert probe((1 << 40, 256), torch.bfloat16, torch.bfloat16, recipe, 1 << 60) > 0


def test_seedling_with_the_real_probe() -> None:
    kernel_or_skip()
    facts = secateur.plan("seedling", **HALF)
    assert facts["decode_speedup"] > 0
    assert facts["faster"] == (facts["decode_speedup"] >= LEAST)
