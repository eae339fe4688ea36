"""Quality of every method on trained models: one protocol, one budget, three seeds.

    python benchmarks/quality.py MODEL --in-domain TRAIN.txt --out-of-domain WIKI.txt --test TEST.txt

Every method x {50, 60, 70}% and 2:4, 4:8, with calibration sampled from the model (`self`), from text of
its own domain, and from another domain. A seed chooses which windows of a text are seen (and what `self`
samples); the test windows are always the same. Cells: mean perplexity over seeds, its range in brackets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from protocol import InMemory
from tables import spread, write_table

from secateur.calibration.windows import Windows
from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, methods_of

BUDGETS = (("unstructured", 0.5), ("unstructured", 0.6), ("unstructured", 0.7), ("2:4", 0.5), ("4:8", 0.5))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--in-domain", type=Path, required=True)
    parser.add_argument("--out-of-domain", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(methods_of("weights")))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Bench(InMemory):
    """With the calibration windows of each source and seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(
            arguments.model, arguments.test, windows=arguments.test_windows, length=arguments.length
        )
        self.samples = arguments.samples
        self.texts = {"self": "self", "in": str(arguments.in_domain), "out": str(arguments.out_of_domain)}
        self.cache: dict[tuple[str, int], Windows] = {}

    def calibration(self, source: str, seed: int) -> Windows:
        if (source, seed) not in self.cache:
            self.restore()
            self.cache[source, seed] = self.windows(self.texts[source], self.samples, seed)
        return self.cache[source, seed]

    def run(self, method: str, pattern: str, sparsity: float, source: str, seed: int) -> float:
        """Perplexity on the test windows after one run."""
        self.prune(
            self.calibration(source, seed), method=method, pattern=pattern, sparsity=sparsity, seed=seed
        )
        return self.perplexity()


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float, str]]:
    for method, (pattern, sparsity) in product(arguments.methods.split(","), BUDGETS):
        data_free = not METHODS.get(method)().statistics
        for source in ["self"] if data_free else ["self", "in", "out"]:
            yield method, pattern, sparsity, source


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    dense = bench.perplexity()
    found: dict[tuple[str, str, float, str], list[float]] = {}
    for key in cells(arguments):
        method, pattern, sparsity, source = key
        try:
            found[key] = [
                bench.run(method, pattern, sparsity, source, seed) for seed in range(arguments.seeds)
            ]
        except RecipeError as error:  # an N:M that does not divide: an empty cell
            print(error, flush=True)
            continue
        print(json.dumps({"cell": key, "perplexity": found[key]}), flush=True)
    heads = ["method", "calibration", *(f"{p} {s:.0%}" if p == "unstructured" else p for p, s in BUDGETS)]
    rows = []
    for method, source in dict.fromkeys((method, source) for method, _, _, source in found):
        values = [found.get((method, p, s, source)) for p, s in BUDGETS]
        shown = [spread(seen, 2) if seen else "-" for seen in values]
        data_free = not METHODS.get(method)().statistics
        rows.append([method, "none" if data_free else source, *shown])
    notes = (
        f"Perplexity of {bench.folder.name}, dense {dense:.3f}, on {bench.tested} windows of "
        f"{arguments.length} tokens of {arguments.test.name}; calibration {arguments.samples} windows of the "
        f"same length; mean over {arguments.seeds} seeds, in brackets the range. Default options. "
        "A dash: the pattern does not divide the widths of this model."
    )
    write_table(f"Quality on {bench.folder.name}", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
