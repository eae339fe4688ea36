"""Structured methods on a trained model: one calibration corpus, the same budgets, quality side by side.

    python benchmarks/structure.py MODEL --calibration TRAIN.txt --test TEST.txt --out structure.md

Every method as it comes, and the variants below, at 20, 35 and 50% of the parameters in blocks; with
`--recover-tokens` every result is also trained on as many tokens of the calibration corpus, against the dense
model, and with `--speed` bytes and speed are measured in place of quality. Each cell is a whole run on files,
read back and judged by secateur itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from protocol import Protocol, named, protocol_parser
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
    parser = protocol_parser(__doc__)
    parser.add_argument("--methods", default=",".join(methods_of("structure")))
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--recover-tokens", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the recovery")
    parser.add_argument("--speed", action="store_true", help="bytes and speed in place of quality")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Bench:
    """Cells of the table."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.protocol = arguments, Protocol(arguments)

    def row(self, method: str, options: dict[str, Any]) -> list[str]:
        """A line of the table; a budget that the method refuses is a dash."""
        cells = []
        for sparsity in BUDGETS:
            try:
                cells.append(self.cell(method, options, sparsity))
            except InputError as error:
                print(f"{method} {options} {sparsity}: {error}", flush=True)
                cells.append("-")
        return [method, named(options), *cells]

    def cell(self, method: str, options: dict[str, Any], sparsity: float) -> str:
        seed, speed = self.arguments.seed, self.arguments.speed
        with tempfile.TemporaryDirectory() as scratch:
            pruned = Path(scratch) / "pruned"
            report = self.protocol.prune(
                pruned, method=method, sparsity=sparsity, options=options, seed=seed, measure_speed=speed
            )
            mended = None
            if self.arguments.recover_tokens:
                mended = self.recovered(pruned, Path(scratch) / "mended")
        found = [method, options, sparsity, report.sparsity, report.bytes_after, report.perplexity_before]
        print(json.dumps([*found, report.perplexity_after, mended and mended.perplexity_after]), flush=True)
        return _speed(report) if speed else _quality(report, mended)

    def recovered(self, pruned: Path, out: Path) -> Report:
        protocol = self.protocol
        report: Report = secateur.recover(
            pruned,
            out,
            text=protocol.calibration["source"],
            teacher=protocol.model,
            how="full",
            tokens=self.arguments.recover_tokens,
            learning_rate=self.arguments.learning_rate,
            length=protocol.length,
            evaluation_text=str(protocol.texts[0]),
            **protocol.judged(seed=self.arguments.seed),
        )
        return report


def _quality(report: Report, mended: Report | None) -> str:
    after = f" > {mended.perplexity_after:.2f}" if mended else ""
    return f"{report.perplexity_after:.2f}{after} / {report.kl_divergence:.2f}"


def _speed(report: Report) -> str:
    decode, prefill = (
        after / before if before and after else float("nan")
        for before, after in (
            (report.decode_tokens_per_second_before, report.decode_tokens_per_second_after),
            (report.prefill_tokens_per_second_before, report.prefill_tokens_per_second_after),
        )
    )
    return f"{report.bytes_after / 1e6:.2f} MB / {decode:.2f} / {prefill:.2f}"


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    rows = [
        bench.row(method, options)
        for method in arguments.methods.split(",")
        for options in [{}, *(VARIANTS.get(method, []) if arguments.variants else [])]
    ]
    after = " > after recovery" if arguments.recover_tokens else ""
    shown = "bytes / decode / prefill, times dense" if arguments.speed else f"perplexity{after} / KL"
    heads = ["method", "options", *(f"{sparsity:.0%}: {shown}" for sparsity in BUDGETS)]
    notes = f"{bench.protocol.notes}Seed {arguments.seed}. Sparsity is of the parameters in blocks. "
    if arguments.recover_tokens:
        notes += (
            f"Recovery: all weights, {arguments.recover_tokens:,} tokens of {arguments.calibration.name}, "
            f"distilled from the dense model, learning rate {arguments.learning_rate}."
        )
    name = Path(arguments.model).name
    write_table(f"Structured pruning of {name}", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
