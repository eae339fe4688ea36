"""secateur against the published procedures in one run: end to end, and SparseGPT's update alone.

    python benchmarks/speed.py --out docs/evidence/speed.md

A synthetic Llama (hidden 1024, FFN 2816, 8 blocks) in float32 in memory, 16,384 calibration tokens. Each
pair runs in turn, published first; the table prints medians and their ratio, how much of the masks is equal,
and for single updates the difference in loss.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from published import published_sparsegpt, published_wanda, sparsegpt_update
from synthetic import PRESETS, write_checkpoint
from tables import write_table
from torch import Tensor
from transformers import LlamaForCausalLM

from secateur.calibration.windows import Windows
from secateur.core.method import METHODS
from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics
from secateur.pipeline.prune_memory import prune_with_windows
from secateur.recipe import Recipe
from secateur.report.model import Layer
from secateur.weights.base import Problem

WINDOWS, LENGTH = 16, 1024
SPARSITY = 0.5
SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


class EndToEnd:
    """One model, pruned in turn by both procedures from the same weights and windows."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        shape = (WINDOWS, LENGTH)
        self.ids = torch.randint(0, self.model.config.vocab_size, shape, generator=generator)

    def published(self, method: str) -> Callable[[], object]:
        run = {"wanda": published_wanda, "sparsegpt": published_sparsegpt}[method]
        return lambda: run(self.model, self.ids, SPARSITY)

    def ours(self, method: str) -> Callable[[], list[Layer]]:
        recipe = Recipe(model="bench", method=method, sparsity=SPARSITY)
        return lambda: prune_with_windows(self.model, recipe, Windows.of(self.ids))

    def run(self, method: str, repeats: int) -> tuple[list[float], list[float], str]:
        """Seconds of both, and how their results agree."""
        seconds: tuple[list[float], list[float]] = ([], [])
        kept: list[dict[str, Tensor]] = []
        losses: list[float] = []
        for _ in range(repeats):
            kept, losses = [], []
            for number, work in enumerate((self.published(method), self.ours(method))):
                self.model.load_state_dict(self.dense)
                spent, rows = timed(work)
                seconds[number].append(spent)
                kept.append(
                    {name: t.clone() for name, t in self.model.state_dict().items() if "proj" in name}
                )
                losses.append(sum(getattr(row, "loss", None) or 0.0 for row in rows))  # type: ignore[attr-defined]
        return *seconds, agreement(kept, self.dense)


def agreement(kept: list[dict[str, Tensor]], dense: dict[str, Tensor]) -> str:
    same = sum(int(((a == 0) == (kept[1][name] == 0)).sum()) for name, a in kept[0].items())
    total = sum(tensor.numel() for tensor in kept[0].values())
    return f"{same / total:.4%} of the mask equal"


def update_rows(repeats: int) -> list[list[str]]:
    """SparseGPT's update of single matrices, from the same Hessian."""
    rows = []
    method = METHODS.get("sparsegpt")()
    for out, width in SHAPES:
        generator = torch.Generator().manual_seed(out + width)
        weight = torch.randn(out, width, generator=generator)
        inputs = torch.randn(8192, width, generator=generator) @ torch.diag(
            torch.rand(width, generator=generator) + 0.1
        )
        hessian = inputs.T @ inputs
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            spent, (slow, _) = timed(lambda h=hessian, w=weight: sparsegpt_update(w, 2 * h, SPARSITY))  # type: ignore[misc]
            seconds[0].append(spent)
            statistics_ = InputStatistics(width, 8192, 1, hessian=hessian)
            problem = Problem("bench", weight, statistics_, Pattern("matrix"), SPARSITY)
            spent, solution = timed(lambda p=problem: method.prune(p))  # type: ignore[misc]
            seconds[1].append(spent)
        losses = [loss(weight, new, hessian) for new in (slow, solution.weight)]  # type: ignore[attr-defined]
        a, b = (statistics.median(s) for s in seconds)
        agree = f"loss {losses[1] / losses[0] - 1:+.2%}"
        rows.append([f"SparseGPT update {out} x {width}", f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}", agree])
    return rows


def loss(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = (weight - new).double()
    return float(((change @ hessian.double()) * change).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = update_rows(arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_checkpoint(folder, PRESETS["1024"])
        bench = EndToEnd(folder)
    for method in ("wanda", "sparsegpt"):
        published, ours, agree = bench.run(method, arguments.repeats)
        a, b = statistics.median(published), statistics.median(ours)
        rows.append([f"{method} end to end", f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", agree])
    heads = ["work", "published, s", "secateur, s", "times faster", "agreement"]
    notes = (
        f"Median of {arguments.repeats} pairs run in turn, {torch.get_num_threads()} threads, float32, "
        f"{WINDOWS} x {LENGTH} tokens, {SPARSITY:.0%}. Published: one sequence at a time, statistics for "
        "every linear separately, full sorts, column by column."
    )
    write_table("Speed against the published procedures", heads, rows, notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
