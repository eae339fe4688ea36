"""ARMOR against plain 2:4 and a low-rank correction of as many numbers.

    python benchmarks/armor.py seedling --calibration TRAIN.txt --test TEST.txt

A seed chooses which windows of the calibration text are seen; the test windows are always the same. The
error of every result is measured on the matrix that came out, in ARMOR's own measure (unit columns, then
unit rows, squared errors weighed by the second moments of the inputs), beside that of NoWag-P for the very
same matrix and inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from protocol import InMemory, named, protocol_parser
from pydantic import Field
from tables import spread, write_table
from torch import Tensor

from secateur.core.errors import RecipeError
from secateur.core.method import METHODS
from secateur.core.pattern import Pattern
from secateur.core.selection import select
from secateur.core.statistics import Statistic
from secateur.report.model import Layer
from secateur.weights.armor_steps import block_sizes
from secateur.weights.base import Problem, Solution, WeightMethod
from secateur.weights.nowag import Normalised, normalise
from secateur.weights.nowag_p import NowagP

PLAIN = ("magnitude", "wanda", "sparsegpt", "alps", "nowag-p")
ANY_SIZE = 99.0
"""An overhead that lets every block have the size asked for."""


class LowRank(WeightMethod):
    """The control: W = S + L, with L of as many numbers as ARMOR's A and B.

    L is the best of its rank in the same measure: the singular vectors of (N - S) sqrt(energy). With more
    than one round S and L take turns, each the best for the other, so the error never rises.
    """

    id: ClassVar[str] = "low-rank"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")
    leaves_zeros: ClassVar[bool] = False

    block: int = Field(128, ge=1, description="of the A and B whose numbers L has")
    overhead: float = Field(0.3, gt=0, description="as that of armor")
    rounds: int = Field(1, ge=1, description="1: S is that of nowag-p")

    def prune(self, problem: Problem) -> Solution:
        whole = normalise(problem.weight, problem.inputs)
        scale = whole.energy.sqrt()
        rows, columns = problem.weight.shape
        group = problem.pattern.of if problem.pattern.kind == "n:m" else 1
        a, b = block_sizes((rows, columns), group, self.block, self.overhead)
        rank = min(round((a * rows + b * columns) / (rows + columns)), rows, columns)
        correction = torch.zeros_like(whole.matrix)
        for _ in range(self.rounds):
            wanted = whole.matrix * scale - correction
            kept = select(wanted.square(), problem.pattern, problem.sparsity, name=problem.name)
            left, values, right = torch.linalg.svd(whole.matrix * scale - wanted * kept, full_matrices=False)
            correction = (left[:, :rank] * values[:rank]) @ right[:rank]
        weight = whole.restored((wanted * kept + correction) / scale)
        return Solution(weight, kept, {"extra": rank * (rows + columns) / problem.weight.numel()})


class Judged:
    """Mixed into a method: notes its error on each matrix, and that of NoWag-P there."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return super().statistics | {"second_moment"}

    def prune(self, problem: Problem) -> Solution:
        solution: Solution = super().prune(problem)
        whole = normalise(problem.weight, problem.inputs)
        solution.notes |= {
            "nowag": _error(NowagP().prune(problem).weight, whole),
            "error": _error(solution.weight, whole),
        }
        return solution


def _error(weight: Tensor, whole: Normalised) -> float:
    """As a share of the energy of the whole matrix, in float64."""
    lost = weight.double() / whole.rows.double()[:, None] / whole.columns.double() - whole.matrix.double()
    total = (whole.matrix.double().square() * whole.energy).sum()
    return float((lost.square() * whole.energy).sum() / total)


def judged(method: str) -> str:
    """The id of that method with `Judged` mixed in."""
    name = f"judged-{method}"
    if name not in METHODS:
        base = LowRank if method == LowRank.id else METHODS.get(method)
        METHODS.register(name)(type("JudgedMethod", (Judged, base), {"id": name}))
    return name


@dataclass(frozen=True)
class Line:
    """A line of the table: a method, its options, and over how many seeds."""

    method: str
    options: dict[str, Any]
    seeds: int


@dataclass(frozen=True)
class Found:
    """One run.

    Attributes:
        extra: numbers beside the core, as a share of those of the matrices.
        nowag: error of NoWag-P, mean over matrices.
        error: that of the result.
        matrices: how many there are.
        above: how many are worse than NoWag-P's, by more than the rounding of float32.
        seconds: of the processor, pruning and judging.
    """

    perplexity: float
    extra: float
    nowag: float
    error: float
    matrices: int
    above: int
    seconds: float

    @classmethod
    def of(cls, layers: Sequence[Layer], perplexity: float, seconds: float) -> Found:
        sizes = [layer.rows * layer.columns for layer in layers]
        notes = [layer.notes for layer in layers]
        extra = sum(note.get("extra", 0.0) * size for note, size in zip(notes, sizes, strict=True))
        return cls(
            perplexity=perplexity,
            extra=extra / sum(sizes),
            nowag=statistics.fmean(note["nowag"] for note in notes),
            error=statistics.fmean(note["error"] for note in notes),
            matrices=len(notes),
            above=sum(note["error"] > note["nowag"] * (1 + 1e-6) for note in notes),
            seconds=seconds,
        )


def parse_arguments() -> argparse.Namespace:
    parser = protocol_parser(__doc__)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=_sizes, default=_sizes("8,16,32,64"), help="sizes, comma separated")
    parser.add_argument("--rounds", type=int, default=60, help="of als, and of the low-rank control")
    parser.add_argument("--middle", type=int, default=16, help="block of the lines that vary another option")
    parser.add_argument("--iterations", type=_sizes, default=[], help="of gd and adam; empty: without them")
    parser.add_argument("--slow-seeds", type=int, default=1, help="of gd, adam, and armor as it comes")
    parser.add_argument("--runs", type=Path, help="keeps finished runs, which are not repeated")
    return parser.parse_args()


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def lines(arguments: argparse.Namespace) -> Iterator[Line]:
    rounds, seeds = arguments.rounds, arguments.seeds
    for method in PLAIN:
        yield Line(method, {}, seeds)
    for block in arguments.blocks:
        yield Line("armor", {"block": block, "iterations": rounds}, seeds)
        yield Line("low-rank", {"block": block}, seeds)
        yield Line("low-rank", {"block": block, "rounds": rounds}, seeds)
    for steps in (0, 1):
        yield Line("armor", {"block": arguments.middle, "iterations": rounds, "core_steps": steps}, seeds)
    yield Line("armor", {}, arguments.slow_seeds)
    for iterations in arguments.iterations:
        slow = {"block": arguments.middle, "iterations": iterations, "core_steps": 1}
        for how in ({"continuous": "gd"}, {"continuous": "adam"}, {"continuous": "adam", "rate": 0.001}):
            yield Line("armor", slow | how, arguments.slow_seeds)


class Bench(InMemory):
    """With the calibration windows of every seed, and the runs that are done."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(
            arguments.model, arguments.test[0], windows=arguments.test_windows, length=arguments.length
        )
        self.pattern, self.runs = arguments.pattern, arguments.runs
        self.calibration = [
            self.windows(str(arguments.calibration), arguments.samples, seed)
            for seed in range(arguments.seeds)
        ]
        kept = self.runs.read_text("utf-8").splitlines() if self.runs and self.runs.exists() else []
        self.done = {key: Found(**found) for key, found in map(json.loads, kept)}

    def run(self, line: Line, seed: int) -> Found:
        key = f"{self.pattern} {line.method} {named(line.options)} {seed}"
        if key not in self.done:
            self.done[key] = found = self._run(line, seed)
            kept = json.dumps([key, asdict(found)])
            print(kept, flush=True)
            if self.runs:
                with self.runs.open("a", encoding="utf-8") as file:
                    file.write(kept + "\n")
        return self.done[key]

    def _run(self, line: Line, seed: int) -> Found:
        free = {"overhead": ANY_SIZE} if "block" in line.options else {}
        started = time.process_time()
        layers = self.prune(
            self.calibration[seed],
            method=judged(line.method),
            options=line.options | free,
            pattern=self.pattern,
            sparsity=0.5,
            seed=seed,
        )
        return Found.of(layers, self.perplexity(), time.process_time() - started)


def cells(line: Line, runs: Sequence[Found], starts: Sequence[float], dense: float) -> list[str]:
    def mean(what: str) -> float:
        return statistics.fmean(getattr(found, what) for found in runs)

    one = len(runs) == 1
    return [
        line.method,
        named(line.options),
        f"{mean('extra'):.1%}" if mean("extra") else "",
        f"{mean('perplexity'):.2f}" if one else spread([found.perplexity for found in runs], 2),
        *(f"{(start - mean('perplexity')) / (start - dense):.0%}" for start in starts),
        f"{mean('nowag'):.4f}",
        f"{mean('error'):.4f}",
        f"{sum(found.above for found in runs)} of {sum(found.matrices for found in runs)}",
        f"{mean('seconds'):.0f}",
    ]


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    dense = bench.perplexity()
    found: list[tuple[Line, list[Found]]] = []
    for line in lines(arguments):
        try:
            found.append((line, [bench.run(line, seed) for seed in range(line.seeds)]))
        except RecipeError as error:
            if line.method in PLAIN:
                raise SystemExit(str(error)) from error  # no line would run
            print(f"{line.method} {named(line.options)}: {error}", flush=True)
    plain = {
        line.method: statistics.fmean(run.perplexity for run in runs)
        for line, runs in found
        if line.method in PLAIN
    }
    best = min(plain, key=lambda method: plain[method])
    heads = ["method", "options", "extra", "perplexity", "back from nowag-p", f"back from {best}"]
    heads += ["error of nowag-p", "error", "matrices above nowag-p", "seconds"]
    starts = (plain["nowag-p"], plain[best])
    core = arguments.pattern if Pattern.parse(arguments.pattern).kind == "n:m" else "50%"
    test, calibration = arguments.test[0], arguments.calibration
    notes = (
        f"{bench.folder.name}, dense perplexity {dense:.2f}, on {bench.tested} windows of {arguments.length} "
        f"tokens of {test.parent.name}/{test.name}; {arguments.samples} windows of {calibration.name} for "
        f"calibration, other ones for every seed. Mean over {arguments.seeds} seeds, in brackets the range; "
        "no brackets: one seed, or none differ. Extra: numbers beside those of the sparse part, as a share "
        "of the matrices. Back: the share of the way to the dense perplexity, from nowag-p and from the best "
        "without extra numbers. Error: in ARMOR's measure, mean over matrices and seeds, beside that of "
        "nowag-p for the matrices and inputs that this line saw. Seconds: of one processor core, all told."
    )
    write_table(
        f"ARMOR at {core} on {bench.folder.name}",
        heads,
        [cells(line, runs, starts, dense) for line, runs in found],
        notes=notes,
        out=arguments.out,
    )


if __name__ == "__main__":
    main()
