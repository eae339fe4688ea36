"""The contract of every method with every family: exact counts, only matrices touched, loads as before.

Each pair is pruned once into a folder. One fresh process without secateur reads all of them back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, UNLISTED, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.anatomy.resolve import resolve
from secateur.core.method import METHODS, methods_of
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern, drop_count
from secateur.report.model import Report

IDS = torch.arange(5, 29).view(2, 12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEXT = (
    "The gardener cut the old branches of the apple tree, and 12 new shoots came up beside the wall.\n" * 40
)
SKIP_OPTIONS = {"alps": {"iterations": 30}}

LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "secateur" not in sys.modules
ids = torch.arange(5, 29).view(2, 12)
for folder in json.load(sys.stdin):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    torch.save(logits, folder + "/logits.pt")
"""


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    pattern: str
    dtype: torch.dtype


@dataclass
class Result:
    source: Path
    folder: Path
    report: Report


def cases() -> list[Case]:
    """Every method with every family; dtype and pattern alternate so that each meets each."""
    found = []
    for f, family in enumerate((*FAMILIES, *UNLISTED)):
        for m, method in enumerate(methods_of("weights")):
            pattern = "2:4" if (f + m) % 2 else "unstructured"
            found.append(Case(family, method, pattern, DTYPES[(f + m) % len(DTYPES)]))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Result]:
    base = tmp_path_factory.mktemp("contract")
    text = base / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sources: dict[tuple[str, torch.dtype], Path] = {}
    results = {}
    for number, case in enumerate(CASES):
        key = (case.family, case.dtype)
        if key not in sources:
            folder = base / f"{case.family}-{case.dtype}"
            sources[key] = save_tiny(case.family, folder, dtype=case.dtype)
        out = base / f"pruned-{number}"
        report = secateur.prune(
            sources[key],
            out,
            method=case.method,
            sparsity=0.5,
            pattern=case.pattern,
            options=SKIP_OPTIONS.get(case.method, {}),
            calibration={"source": str(text), "samples": 4, "length": 24},
            evaluation_windows=0,
            measure_speed=False,
        )
        results[case] = Result(sources[key], out, report)
    return results


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.method}-{case.pattern}")
def test_exact_sparsity_and_nothing_else_touched(case: Case, results: dict[Case, Result]) -> None:
    result = results[case]
    dense, pruned = load(result.source), load(result.folder)
    anatomy = resolve(dense.config)
    rows = {(row.block, row.matrix): row for row in result.report.layers}
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    touched = set()
    pattern = Pattern.parse(case.pattern).resolve(METHODS.get(case.method).default_pattern)
    for block in anatomy.blocks:
        inside = {name.removeprefix(block.prefix + "."): tensor for name, tensor in after.items()}
        for matrix in block.matrices:
            touched.add(f"{block.prefix}.{matrix.parameter}")
            weight = matrix.view(inside)
            row = rows.pop((block.index, matrix.name))
            assert (row.rows, row.columns) == tuple(weight.shape)
            if pattern.kind == "n:m":
                assert check_pattern(weight, pattern) == 0
            fewest = drop_count(weight.shape[1], 0.5) * weight.shape[0]
            if pattern.kind == "matrix":
                fewest = drop_count(weight.numel(), 0.5)
            zeros = int((weight == 0).sum())
            assert zeros >= fewest
            assert row.sparsity == pytest.approx(fewest / weight.numel())
    assert not rows, "the report names matrices that the anatomy does not"
    for name, tensor in before.items():
        if name not in touched:
            assert torch.equal(tensor, after[name]), name


def test_stock_transformers_reads_the_same_in_a_fresh_process(results: dict[Case, Result]) -> None:
    folders = [str(result.folder) for result in results.values()]
    subprocess.run([sys.executable, "-c", LOADER], input=json.dumps(folders), text=True, check=True)
    for case, result in results.items():
        with torch.no_grad():
            expected = load(result.folder)(input_ids=IDS, use_cache=False).logits
        fresh = torch.load(result.folder / "logits.pt", weights_only=True)
        assert torch.equal(fresh, expected), case
        assert torch.isfinite(fresh).all(), case


def test_every_method_changes_something(results: dict[Case, Result]) -> None:
    for case, result in results.items():
        assert 0.45 < result.report.sparsity <= 0.5 + 1e-9, case
