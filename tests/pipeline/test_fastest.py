"""The speed in a report is that of the files as they are best loaded here, and the report says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

import secateur
from runtime.matrices import kernel_or_skip
from secateur.pipeline import fastest
from secateur.pipeline.fastest import load_fastest, why_unpacked
from secateur.pipeline.opened import open_model
from secateur.report.model import Report
from secateur.report.verdict import rows, verdict
from secateur.runtime import build, compiled, facts, products
from secateur.runtime.packed_experts import PackedExperts
from secateur.runtime.packed_linear import PackedLinear, unpack_and_multiply

CPU = torch.device("cpu")
HALF = {"method": "magnitude", "sparsity": 0.5, "evaluation_windows": 0, "check_loading": False}


def pruned(model: Path, out: Path, **settings: Any) -> Report:
    report: Report = secateur.prune(model, out, **{**HALF, "measure_speed": False, **settings})
    return report


def tiny(family: str, tmp_path: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    model = save_tiny(family, tmp_path / "model", dtype=dtype)
    pruned(model, tmp_path / "out", **settings)
    return open_model(tmp_path / "out")


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (compiled, facts):
        monkeypatch.setattr(room, "library", lambda: None)
    monkeypatch.setattr(facts, "why_missing", lambda: "no C++ compiler (g++, or name one in CXX)")


def test_a_run_times_packed_files_kept_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_or_skip()
    model, packed = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16), list[bool]()

    def watched(*arguments: Any) -> Any:
        found = load_fastest(*arguments)
        packed.append(any(isinstance(module, PackedLinear) for module in found.model.modules()))
        return found

    monkeypatch.setattr("secateur.pipeline.verify.load_fastest", watched)
    report = pruned(model, tmp_path / "out", format="bitmask", measure_speed=True)
    assert packed == [False, True]  # the dense model, and the result
    assert report.runtime is not None
    assert report.runtime.before == "dense"
    assert report.runtime.after.startswith("packed (compiled")
    assert report.runtime.weight_bytes_after < 0.6 * report.runtime.weight_bytes_before
    assert report.runtime.dtype == "float32"
    assert f"loaded {report.runtime.after}" in verdict(report)
    assert "It was timed kept packed (compiled" in report.effect
    (row,) = (row for row in rows(report) if row.key == "weight_bytes")
    assert (row.before, row.outcome) == (report.runtime.weight_bytes_before, "better")
    assert report.runtime.after in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'mode="packed"' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert Report.load(tmp_path / "out").runtime == report.runtime


def test_without_a_kernel_they_are_timed_unpacked_and_the_report_says_why(
    no_kernel: None, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = pruned(model, tmp_path / "out", format="bitmask", measure_speed=True)
    assert report.runtime is not None
    assert report.runtime.after == "dense (no C++ compiler (g++, or name one in CXX))"
    assert report.runtime.weight_bytes_after == report.runtime.weight_bytes_before
    assert "It was timed dense (no C++ compiler" in report.effect
    assert "loaded dense (no C++ compiler" in verdict(report)


def test_dense_files_need_no_reason(tmp_path: Path) -> None:
    report = pruned(Path("seedling"), tmp_path / "out", measure_speed=True)
    assert report.runtime is not None
    assert (report.runtime.before, report.runtime.after) == ("dense", "dense")
    assert "loaded" not in verdict(report)
    assert why_unpacked(open_model(tmp_path / "out"), torch.float32, CPU) == ""


def test_what_was_not_timed_says_nothing_of_it(tmp_path: Path) -> None:
    report = pruned(Path("seedling"), tmp_path / "out", format="bitmask")
    assert report.runtime is None
    assert "timed" not in report.effect
    assert "% less on disk (2.89 MB before" in report.effect


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", torch.float32, {"format": "bitmask"}),
        ("llama", torch.bfloat16, {"format": "nm", "pattern": "4:8"}),
    ],
    ids=["float32", "4:8"],
)
def test_weights_that_the_kernel_does_not_take(
    family: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    opened = tiny(family, tmp_path, dtype, **settings)
    assert why_unpacked(opened, torch.float32, CPU) == facts.TAKEN


@pytest.mark.parametrize(("family", "format"), [("llama", "bitmask"), ("llama", "nm"), ("gpt2", "nm")])
def test_weights_that_it_takes(family: str, format: str, tmp_path: Path) -> None:
    """As the headers tell: the very layers from which it then computes."""
    kernel_or_skip()
    opened = tiny(family, tmp_path, format=format, pattern="2:4")
    for dtype in (torch.float32, torch.bfloat16):
        assert why_unpacked(opened, dtype, CPU) is None
    assert why_unpacked(opened, torch.float16, CPU) == facts.TAKEN
    loaded = load_fastest(opened, torch.float32, CPU)
    linears = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == len(opened.checkpoint.formats)
    assert all(compiled.matrix_of(linear, linear.format, linear.parts) for linear in linears)


def test_other_devices(tmp_path: Path) -> None:
    opened = tiny("llama", tmp_path, format="bitmask")
    assert why_unpacked(opened, torch.bfloat16, torch.device("cuda")) == "the kernel is one for CPUs"


def test_a_kernel_of_another_package_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tiny("llama", tmp_path, torch.float32, format="bitmask")
    monkeypatch.setitem(
        products.KERNELS, "bitmask", lambda linear, inputs: unpack_and_multiply(linear, inputs)
    )
    assert why_unpacked(opened, torch.float32, CPU) is None
    assert load_fastest(opened, torch.float32, CPU).words == "packed (that of bitmask)"
    monkeypatch.delitem(products.KERNELS, "bitmask")
    model = opened.load(torch.float32, CPU, packed=True)
    assert facts.kernel_of(model) == "none, bitmask is unpacked for every product"


def test_factors_save_memory_and_no_time(tmp_path: Path) -> None:
    options = {"block": 8, "iterations": 1, "store": "factors"}
    opened = tiny("llama", tmp_path, torch.float16, method="armor", pattern="2:4", options=options)
    assert why_unpacked(opened, torch.float32, CPU) == facts.TAKEN
    assert facts.kernel_of(opened.load(torch.float32, CPU, packed=True)) == "that of armor"


def test_experts_that_are_stored_one_by_one_are_kept_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_or_skip()
    opened = tiny("mixtral", tmp_path, format="bitmask")
    assert why_unpacked(opened, torch.float32, CPU) is None
    model = load_fastest(opened, torch.float32, CPU).model
    shapes: list[tuple[int, int]] = []
    real = compiled.linear
    monkeypatch.setattr(
        compiled,
        "linear",
        lambda kernel, matrix, *rest: shapes.append(matrix.shape) or real(kernel, matrix, *rest),
    )
    with torch.no_grad():
        model(torch.arange(5, 9)[None])
    experts = [
        layer for module in model.modules() if isinstance(module, PackedExperts) for layer in module.modules()
    ]
    ours = {(layer.out_features, layer.in_features) for layer in experts if isinstance(layer, PackedLinear)}
    assert ours
    assert ours <= set(shapes)


def test_experts_in_one_tensor_are_unpacked_while_loading(tmp_path: Path) -> None:
    kernel_or_skip()
    opened = tiny("gpt_oss", tmp_path, format="bitmask")
    assert why_unpacked(opened, torch.float32, CPU) == facts.TAKEN


def test_transposed_matrices_are_unpacked_in_other_formats_than_nm(tmp_path: Path) -> None:
    kernel_or_skip()
    opened = tiny("gpt2", tmp_path, format="bitmask")
    assert why_unpacked(opened, torch.float32, CPU) == fastest.UNPACKED
    assert load_fastest(opened, torch.float32, CPU).words == f"dense ({fastest.UNPACKED})"


def test_no_kernel_is_built_for_weights_that_it_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tiny("llama", tmp_path, torch.float32, format="bitmask")
    monkeypatch.setattr(build, "_loaded", lambda: pytest.fail("it was looked for"))
    assert why_unpacked(opened, torch.float32, CPU)


def test_bench_follows(no_kernel: None, tmp_path: Path) -> None:
    tiny("llama", tmp_path, format="bitmask")
    quick: dict[str, Any] = {"repeats": 1, "new_tokens": 2, "prompt_tokens": 4}
    by_itself = secateur.bench(tmp_path / "out", **quick)
    assert by_itself["kernel"].startswith("none, loaded dense: no C++ compiler")
    asked = secateur.bench(tmp_path / "out", packed=True, **quick)
    assert asked["kernel"].startswith("none, packed weights are unpacked for every product")
    assert asked["weight_bytes"] < by_itself["weight_bytes"]
    assert secateur.bench(tmp_path / "out", packed=False, **quick)["kernel"] is None


def test_recovery_says_what_became_of_packed_weights(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    pruned(model, tmp_path / "half", format="bitmask")
    (tmp_path / "text.txt").write_text("The gardener cut the old branches of the apple tree.\n" * 60)
    given: dict[str, Any] = {
        "text": str(tmp_path / "text.txt"), "how": "refit", "teacher": str(model), "tokens": 256,
        "length": 24, "evaluation_windows": 0, "check_loading": False,
    }  # fmt: skip
    dense = secateur.recover(tmp_path / "half", tmp_path / "dense", **given)
    assert "packed files came in, and these are dense" in dense.effect
    packed = secateur.recover(tmp_path / "half", tmp_path / "packed", format="bitmask", **given)
    assert "stored as bitmask" in packed.effect
    again = secateur.recover(model, tmp_path / "plain", **{**given, "teacher": None, "how": "full"})
    assert again.effect.startswith("Training changed values, not shapes: the files are as large")
