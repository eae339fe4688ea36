"""Structured methods on a trained model: one calibration corpus, one budget, quality side by side.

    python benchmarks/structure.py MODEL --calibration TRAIN.txt --test TEST.txt --out structure.md

Every method with every compensation, at 20, 35 and 50% of the parameters in blocks. Each cell is a whole run
on files, read back and judged by `secateur.prune` itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

from tables import write_table

import secateur
from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, methods_of
from secateur.report.model import Report

BUDGETS = (0.2, 0.35, 0.5)
COMPENSATIONS = ("none", "bias", "least_squares")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--methods", default=",".join(methods_of("structure")))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run(arguments: argparse.Namespace, method: str, options: dict[str, str], sparsity: float) -> Report:
    with tempfile.TemporaryDirectory() as scratch:
        return secateur.prune(
            arguments.model,
            Path(scratch) / "out",
            method=method,
            sparsity=sparsity,
            options=options,
            calibration={
                "source": str(arguments.calibration),
                "samples": arguments.samples,
                "length": arguments.length,
            },
            text=str(arguments.test),
            evaluation_windows=arguments.test_windows,
            seed=arguments.seed,
            measure_speed=False,
        )


def accepted(method: str, options: dict[str, str]) -> bool:
    try:
        METHODS.get(method).from_options(options)
    except RecipeError:
        return False
    return True


def main() -> None:
    arguments = parse_arguments()
    rows, dense = [], ""
    for method, compensate, spread in product(
        arguments.methods.split(","), COMPENSATIONS, ("uniform", "global")
    ):
        if not accepted(method, {"compensate": compensate, "spread": spread}):
            continue
        if METHODS.get(method)().statistics == frozenset() and compensate == "none" and spread == "global":
            continue  # scores without data are not made to compete over blocks
        cells = []
        for sparsity in BUDGETS:
            report = run(arguments, method, {"compensate": compensate, "spread": spread}, sparsity)
            dense = f"{report.perplexity_before:.2f}"
            cells.append(f"{report.perplexity_after:.2f} / {report.kl_divergence:.2f}")
            print(json.dumps([method, compensate, spread, sparsity, report.perplexity_after]), flush=True)
        rows.append([method, compensate, spread, *cells])
    heads = [
        "method",
        "compensation",
        "spread",
        *(f"{sparsity:.0%}: perplexity / KL" for sparsity in BUDGETS),
    ]
    notes = (
        f"{Path(arguments.model).name}, dense perplexity {dense} on {arguments.test_windows} windows of "
        f"{arguments.length} tokens of {arguments.test.name}; calibration {arguments.samples} windows of "
        f"{arguments.calibration.name}, seed {arguments.seed}. Sparsity is of the parameters in blocks. "
        "No recovery."
    )
    write_table(
        f"Structured pruning of {Path(arguments.model).name}", heads, rows, notes=notes, out=arguments.out
    )


if __name__ == "__main__":
    main()
