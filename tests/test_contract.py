"""The contract of every method with every family: exact counts, only matrices touched, loads as before.

Each pair is pruned once into a folder. One fresh process without secateur reads those of a family back.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from elsewhere import IDS, logits_elsewhere
from small_runs import prune
from tiny_models import FAMILIES, UNLISTED, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.anatomy.resolve import resolve
from secateur.core.method import METHODS, methods_of
from secateur.core.pattern import Pattern
from secateur.core.selection import check_pattern, drop_count
from secateur.report.model import Report

ALL = (*FAMILIES, *UNLISTED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"alps": {"iterations": 30}, "armor": {"iterations": 3}}


class Result(NamedTuple):
    source: Path
    folder: Path
    pattern: str
    report: Report


class Results(dict[str, Result]):
    """What each method makes of one family, made when it is asked for.

    Dtype and pattern alternate over families and methods, so that each meets each.
    """

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder

    def __missing__(self, method: str) -> Result:
        turn = ALL.index(self.family) + methods_of("weights").index(method)
        dtype, pattern = DTYPES[turn % len(DTYPES)], "2:4" if turn % 2 else "unstructured"
        source = self.folder / str(dtype)
        if not source.exists():
            save_tiny(self.family, source, dtype=dtype)
        out = self.folder / method
        report = prune(
            source, out, method=method, sparsity=0.5, pattern=pattern, options=OPTIONS.get(method, {}),
            calibration={"samples": 4}, evaluation_windows=0,
        )  # fmt: skip
        return self.setdefault(method, Result(source, out, pattern, report))


@pytest.fixture(scope="module", params=ALL)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of one family after the other: pytest runs the tests of a family in a row."""
    return Results(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", methods_of("weights"))
def test_exact_sparsity_and_nothing_else_touched(method: str, results: Results) -> None:
    result = results[method]
    assert 0.45 < result.report.sparsity <= 0.5 + 1e-9
    dense, pruned = load(result.source), load(result.folder)
    anatomy = resolve(dense.config)
    rows = {(row.block, row.matrix): row for row in result.report.layers}
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    touched = set()
    pattern = Pattern.parse(result.pattern).resolve(METHODS.get(method).default_pattern)
    for block in anatomy.blocks:
        inside = {name.removeprefix(block.prefix + "."): tensor for name, tensor in after.items()}
        for matrix in block.matrices:
            touched.add(f"{block.prefix}.{matrix.parameter}")
            weight = matrix.view(inside)
            row = rows.pop((block.index, matrix.name))
            assert (row.rows, row.columns) == tuple(weight.shape)
            leaves_zeros = METHODS.get(method).leaves_zeros
            if pattern.kind == "n:m" and leaves_zeros:
                assert check_pattern(weight, pattern) == 0
            fewest = drop_count(weight.shape[1], 0.5) * weight.shape[0]
            if pattern.kind == "matrix":
                fewest = drop_count(weight.numel(), 0.5)
            zeros = int((weight == 0).sum())
            assert zeros >= fewest or not leaves_zeros
            assert row.sparsity == pytest.approx(fewest / weight.numel())
    assert not rows, "the report names matrices that the anatomy does not"
    for name, tensor in before.items():
        if name not in touched:
            assert torch.equal(tensor, after[name]), name


def test_stock_transformers_reads_the_same_in_a_fresh_process(results: Results) -> None:
    methods = methods_of("weights")
    read = logits_elsewhere(results[method].folder for method in methods)
    for method, fresh in zip(methods, read, strict=True):
        with torch.no_grad():
            expected = load(results[method].folder)(input_ids=IDS, use_cache=False).logits
        assert torch.equal(fresh, expected), method
        assert torch.isfinite(fresh).all(), method
