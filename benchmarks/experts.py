"""Experts of a mixture removed: every method, shares and seeds under one protocol, and STUN's central claim.

    python benchmarks/experts.py MODEL --calibration TRAIN.txt --test TEST.txt --out experts.md

First table: perplexity of every method at each share, with the range over seeds of what is drawn at random.
Second (`--stun wanda`): experts first and weights then, against weights alone, at equal total sparsity of the
prunable parameters, by one method for weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from protocol import Protocol, named, protocol_parser
from tables import spread, write_table

import secateur
from secateur.checkpoint.headers import Headers
from secateur.core.errors import InputError
from secateur.core.method import methods_of

SHARES = (0.25, 0.5)
TOTALS = (0.3, 0.5, 0.65)
EXPERTS_FIRST = (0.0, 0.125, 0.25, 0.375, 0.5)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "stun": [{"representative": "frequency"}, {"similarity": "coactivation"}, {"spread": "uniform"}],
    "frequency-experts": [{"weighting": "gates"}],
    "merge-experts": [{"router": "representative"}],
}
"""Beside each method as it comes."""


def parse_arguments() -> argparse.Namespace:
    parser = protocol_parser(__doc__, test_windows=32)
    parser.add_argument("--methods", default=",".join(methods_of("experts")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stun", default="", help="also experts, then weights by this method: wanda")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


class Bench:
    """Runs of one model on files, judged on every text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.protocol = arguments, Protocol(arguments)

    def share(self, method: str, options: dict[str, Any], share: float, seed: int) -> list[float]:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            report = self.protocol.prune(out, seed=seed, method=method, sparsity=share, options=options)
            found = [report.perplexity_after or 0.0, *(after for _, after in self.protocol.others(out))]
            found.append(report.bytes_after / report.bytes_before)
        print(json.dumps([method, options, share, seed, *found]), flush=True)
        return found

    def two_stages(self, first: float, total: float) -> float | None:
        """Perplexity when `total` of the prunable parameters go, experts first; None for too much."""
        prunable = secateur.inspect(self.arguments.model)["parameters_prunable"]
        with tempfile.TemporaryDirectory() as scratch:
            model, out, gone = Path(self.arguments.model), Path(scratch) / "out", 0
            if first:
                model = Path(scratch) / "fewer"
                report = self.protocol.prune(model, method="stun", sparsity=first)
                gone = Headers.open(self.arguments.model).parameters - report.parameters_after
            rest = (total * prunable - gone) / (prunable - gone)
            if rest < 0.01:
                return None
            report = self.protocol.prune(out, model=model, method=self.arguments.stun, sparsity=rest)
        print(json.dumps(["stages", first, total, rest, report.perplexity_after]), flush=True)
        return report.perplexity_after


def seeds(bench: Bench, method: str) -> range:
    """A method that draws nothing is the same for every seed: calibration is the start of the text."""
    return range(bench.arguments.seeds if method.startswith("random") else 1)


def method_row(bench: Bench, method: str, options: dict[str, Any]) -> list[str]:
    row = [method, named(options)]
    for share in SHARES:
        try:
            found = [bench.share(method, options, share, seed) for seed in seeds(bench, method)]
        except InputError as error:
            print(f"{method} {options} {share}: {error}", flush=True)
            row += ["-"] * (len(bench.arguments.test) + 1)
            continue
        columns = [list(column) for column in zip(*found, strict=True)]
        row += [*map(spread, columns[:-1]), f"{columns[-1][0]:.2f}"]
    return row


def stage_row(bench: Bench, first: float) -> list[str]:
    row = [f"{first:.1%}"]
    for total in TOTALS:
        found = bench.two_stages(first, total)
        row.append("-" if found is None else f"{found:.1f}")
    return row


def main() -> None:
    arguments = parse_arguments()
    bench, name = Bench(arguments), Path(arguments.model).name
    texts = [f"{text.parent.name}/{text.name}" for text in arguments.test]
    notes = (
        f"{bench.protocol.notes}{arguments.seeds} seeds (mean, and range of what is drawn at random). Shares "
        "are of the routed experts; bytes are of the dense file."
    )
    if not arguments.stun:
        rows = [
            method_row(bench, method, options)
            for method in arguments.methods.split(",")
            for options in [{}, *(VARIANTS.get(method, []) if arguments.variants else [])]
        ]
        heads = ["method", "options"]
        for share in SHARES:
            heads += [f"{share:.0%}: {text}" for text in texts] + [f"{share:.0%}: bytes"]
        write_table(f"Experts of {name}", heads, rows, notes=notes, out=arguments.out)
        return
    heads = ["experts removed first", *(f"{total:.0%} in all" for total in TOTALS)]
    rows = [stage_row(bench, first) for first in EXPERTS_FIRST]
    write_table(f"stun, then {arguments.stun}: {name}", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
