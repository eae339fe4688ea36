"""Structured methods on a trained model: one calibration corpus, the same budgets, quality side by side.

    python benchmarks/structure.py MODEL --calibration TRAIN.txt --test TEST.txt --out structure.md

Every method as it comes, and the variants below, at 20, 35 and 50% of the parameters in blocks; with
`--recover-tokens` every result is also trained on as many tokens of the calibration corpus, against the dense
model. Each cell is a whole run on files, read back and judged by secateur itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tables import write_table

import secateur
from secateur.core.errors import InputError
from secateur.core.method import methods_of
from secateur.report.model import Report

BUDGETS = (0.2, 0.35, 0.5)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "flap": [{"compensate": "none"}, {"compensate": "least_squares"}, {"spread": "uniform"}],
    "osscar": [{"compensate": "none"}, {"spread": "global"}],
    "wanda-structure": [{"compensate": "least_squares"}],
    "random-structure": [{"compensate": "least_squares"}],
    "cfsp": [{"targets": "all"}],
    "tyr": [{"generations": 0}],
    "shortgpt": [{"metric": "angular"}],
    "llm-pruner": [{"order": "vector"}, {"order": "second"}],
}
"""Beside each method as it comes."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--methods", default=",".join(methods_of("structure")))
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--recover-tokens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def run(
    arguments: argparse.Namespace, method: str, options: dict[str, Any], sparsity: float
) -> tuple[Report, Report | None]:
    """The reports of pruning and of the recovery after it."""
    with tempfile.TemporaryDirectory() as scratch:
        pruned = Path(scratch) / "pruned"
        shared: dict[str, Any] = {
            "evaluation_windows": arguments.test_windows,
            "seed": arguments.seed,
            "measure_speed": False,
            "check_loading": False,
        }
        report = secateur.prune(
            arguments.model,
            pruned,
            method=method,
            sparsity=sparsity,
            options=options,
            calibration={
                "source": str(arguments.calibration),
                "samples": arguments.samples,
                "length": arguments.length,
            },
            text=str(arguments.test),
            **shared,
        )
        if not arguments.recover_tokens:
            return report, None
        mended = secateur.recover(
            pruned,
            Path(scratch) / "mended",
            text=str(arguments.calibration),
            teacher=arguments.model,
            how="full",
            tokens=arguments.recover_tokens,
            length=arguments.length,
            evaluation_text=str(arguments.test),
            **shared,
        )
        return report, mended


def row(arguments: argparse.Namespace, method: str, options: dict[str, Any]) -> list[str]:
    """A line of the table; a budget that the method refuses is a dash."""
    cells = []
    for sparsity in BUDGETS:
        try:
            report, mended = run(arguments, method, options, sparsity)
        except InputError as error:
            print(f"{method} {options} {sparsity}: {error}", flush=True)
            cells.append("-")
            continue
        after = f" > {mended.perplexity_after:.2f}" if mended else ""
        cells.append(f"{report.perplexity_after:.2f}{after} / {report.kl_divergence:.2f}")
        found = [method, options, sparsity, report.sparsity, report.bytes_after, report.perplexity_before]
        print(json.dumps([*found, report.perplexity_after, mended and mended.perplexity_after]), flush=True)
    return [method, " ".join(f"{key}={value}" for key, value in options.items()) or "as it comes", *cells]


def main() -> None:
    arguments = parse_arguments()
    rows = [
        row(arguments, method, options)
        for method in arguments.methods.split(",")
        for options in [{}, *(VARIANTS.get(method, []) if arguments.variants else [])]
    ]
    after = " > after recovery" if arguments.recover_tokens else ""
    heads = ["method", "options", *(f"{sparsity:.0%}: perplexity{after} / KL" for sparsity in BUDGETS)]
    notes = (
        f"{Path(arguments.model).name}, {arguments.test_windows} windows of {arguments.length} tokens of "
        f"{arguments.test.name}; calibration {arguments.samples} windows of {arguments.calibration.name}, "
        f"seed {arguments.seed}. Sparsity is of the parameters in blocks. "
    )
    if arguments.recover_tokens:
        notes += (
            f"Recovery: all weights, {arguments.recover_tokens:,} tokens of {arguments.calibration.name}, "
            "distilled from the dense model."
        )
    name = Path(arguments.model).name
    write_table(f"Structured pruning of {name}", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
