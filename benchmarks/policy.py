"""Feed-forward channels away without text: how PruneNet compares with simpler scores at equal sizes.

python benchmarks/policy.py seedling --calibration TRAIN.txt --test TEST.txt [--out policy.md]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tables import write_table

import secateur
from secateur.pipeline.opened import open_model
from secateur.pipeline.ways.unit_weights import UnitWeights
from secateur.structure.magnitude_structure import MagnitudeStructure
from secateur.structure.spectral import ks_distance, singular_values

PUBLISHED = {
    "network": "factored", "reward": "inv_ks", "estimator": "faithful", "samples": 1, "inference": "sample",
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "prunenet, linear": ("prunenet", {}, 3),
    "prunenet, linear on three matrices": ("prunenet", {"features": "gate_up_down"}, 1),
    "prunenet, mlp": ("prunenet", {"network": "mlp"}, 3),
    "prunenet, factored": ("prunenet", {"network": "factored"}, 1),
    "prunenet, as published": ("prunenet", PUBLISHED, 1),
    "magnitude-structure": ("magnitude-structure", {"targets": "ffn"}, 1),
    "random-structure": ("random-structure", {"targets": "ffn"}, 3),
    "wanda-structure": ("wanda-structure", {"targets": "ffn"}, 1),
    "flap": ("flap", {"targets": "ffn", "spread": "uniform"}, 1),
}
"""Method, options, and over how many seeds."""


def first_matrices(model: str | Path) -> list[torch.Tensor]:
    """The first feed-forward matrix of every block."""
    method = MagnitudeStructure.from_options({"targets": "ffn"})
    problems = UnitWeights(open_model(model), method, 0, torch.device("cpu"))
    return [problem.producers[0] for problem in problems]


def distance(dense: list[torch.Tensor], pruned: Path) -> float:
    """Mean Kolmogorov-Smirnov distance of the singular values of the first matrices."""
    pairs = zip(dense, first_matrices(pruned), strict=True)
    found = [ks_distance(singular_values(a), singular_values(b)) for a, b in pairs]
    return float(torch.stack(found).mean())


def share_of_blocks(model: str, rows: float) -> float:
    """What part of the parameters of all blocks these rows are."""
    anatomy = open_model(model).anatomy
    method = MagnitudeStructure.from_options({"targets": "ffn"})
    units = [found for block in anatomy.blocks for found in method.units(block)]
    return rows * sum(found.count * found.parameters for found in units) / anatomy.block_parameters


def runs(arguments: argparse.Namespace, title: str, scratch: Path) -> Iterator[tuple[float, float, float]]:
    """Perplexity, distance and seconds to the pruned files: all shares of rows, seed after seed. Scores are
    found once a seed and serve all shares."""
    method, options, seeds = RUNS[title]
    dense = first_matrices(arguments.model)
    calibration = {"source": arguments.calibration, "samples": arguments.windows, "length": arguments.length}
    for seed in range(seeds):
        scores = None
        for rows in arguments.rows:
            out, started = scratch / f"{seed}-{rows}", time.perf_counter()
            secateur.prune(
                arguments.model, out, method=method, options=options, seed=seed, calibration=calibration,
                sparsity=share_of_blocks(arguments.model, rows), scores=scores,
                evaluation_windows=0, measure_speed=False,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            scores = str(out / "scores.safetensors")
            judged = secateur.evaluate(
                out, text=arguments.test, windows=arguments.windows, length=arguments.length
            )
            yield judged["perplexity"], distance(dense, out), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--rows", type=float, nargs="+", default=[0.2, 0.35])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    arguments = parser.parse_args()
    before = secateur.evaluate(
        arguments.model, text=arguments.test, windows=arguments.windows, length=arguments.length
    )
    table = []
    for title in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            found = list(runs(arguments, title, Path(scratch)))
        row = [title, f"{found[0][2]:.1f}"]
        for number in range(len(arguments.rows)):
            perplexities, distances, _ = zip(*found[number :: len(arguments.rows)], strict=True)
            mean, half = sum(perplexities) / len(perplexities), (max(perplexities) - min(perplexities)) / 2
            row += [f"{mean:.2f} ({half:.2f})", f"{sum(distances) / len(distances):.4f}"]
        table.append(row)
        print(*row, sep="  ", flush=True)
    write_table(
        "Channels without text",
        ["method", "s", *(f"{rows:.0%}{what}" for rows in arguments.rows for what in ("", ", KS"))],
        table,
        notes=f"Perplexity of {arguments.model}, dense {before['perplexity']:.2f}, on {arguments.windows} "
        f"windows of {arguments.length} tokens when these shares of its feed-forward channels go, the "
        "same in every block; as many windows of calibration for wanda-structure and flap. Mean over 3 seeds "
        "for linear, mlp and random, in brackets half the range. KS: mean distance of the singular values of "
        "the first feed-forward matrices. Seconds of the run that finds the scores and cuts.",
        out=arguments.out,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
