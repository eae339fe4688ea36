"""Quality of every method on trained models: one protocol, one budget, three seeds.

    python benchmarks/quality.py MODEL --in-domain TRAIN.txt --out-of-domain WIKI.txt --test TEST.txt

Every method x {50, 60, 70}% and 2:4, 4:8, with calibration sampled from the model (`self`), from text of
its own domain, and from another domain. A seed chooses which windows of a text are seen (and what `self`
samples); the test windows are always the same. Cells: mean perplexity over seeds, half its range in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tables import write_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.calibration.source import MemorySource
from secateur.calibration.windows import Windows, load_windows
from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, methods_of
from secateur.evaluation.quality import perplexity
from secateur.pipeline.prune_memory import prune_with_windows
from secateur.recipe import Recipe

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


class Bench:
    """The model, its test windows, and the calibration windows of each source and seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder = secateur.inspect(arguments.model)["folder"]
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()
        self.dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.test = self.windows(str(arguments.test), arguments.test_windows, 0)
        self.texts = {"self": "self", "in": str(arguments.in_domain), "out": str(arguments.out_of_domain)}
        self.cache: dict[tuple[str, int], Windows] = {}

    def windows(self, source: str, samples: int, seed: int) -> Windows:
        """`samples` windows; those of seed s begin where those of seed s - 1 end."""
        if source == "self":
            return load_windows(
                "self", tokenizer=self.tokenizer, samples=samples, length=self.arguments.length, seed=seed,
                model=lambda: self.model,
            )  # fmt: skip
        every = load_windows(
            source, tokenizer=self.tokenizer, samples=samples * (seed + 1), length=self.arguments.length
        )
        return every if seed == 0 else every.split(samples * seed)[1]

    def calibration(self, source: str, seed: int) -> Windows:
        if (source, seed) not in self.cache:
            self.restore()
            self.cache[source, seed] = self.windows(self.texts[source], self.arguments.samples, seed)
        return self.cache[source, seed]

    def restore(self) -> None:
        self.model.load_state_dict(self.dense)

    def run(self, method: str, pattern: str, sparsity: float, source: str, seed: int) -> float:
        """Perplexity on the test windows after one run."""
        calibration = self.calibration(source, seed)
        self.restore()
        recipe = Recipe(model="bench", method=method, pattern=pattern, sparsity=sparsity, seed=seed)
        prune_with_windows(self.model, recipe, calibration)
        return perplexity(MemorySource(self.model), self.test, batch_size=16)


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float, str]]:
    for method, (pattern, sparsity) in product(arguments.methods.split(","), BUDGETS):
        data_free = not METHODS.get(method)().statistics
        for source in ["self"] if data_free else ["self", "in", "out"]:
            yield method, pattern, sparsity, source


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    dense = perplexity(MemorySource(bench.model), bench.test, batch_size=16)
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
        shown = [cell(found.get((method, p, s, source), [])) for p, s in BUDGETS]
        data_free = not METHODS.get(method)().statistics
        rows.append([method, "none" if data_free else source, *shown])
    notes = (
        f"Perplexity of {Path(bench.folder).name}, dense {dense:.3f}, on {len(bench.test)} windows of "
        f"{arguments.length} tokens of {arguments.test.name}; calibration {arguments.samples} windows of the "
        f"same length; mean over {arguments.seeds} seeds, in brackets half the range. Default options. "
        "A dash: the pattern does not divide the widths of this model."
    )
    write_table(f"Quality on {Path(bench.folder).name}", heads, rows, notes=notes, out=arguments.out)


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ({(max(values) - min(values)) / 2:.2f})"


if __name__ == "__main__":
    main()
