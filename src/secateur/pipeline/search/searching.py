"""The search for how many units go where, in ever finer steps, on disk after every generation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from secateur.anatomy.units import Units
from secateur.calibration.distributed import Group
from secateur.checkpoint.durable import write_bytes
from secateur.core.evolution import Evaluate, Evolution, Generation, Levels
from secateur.evaluation.memory import available_memory_bytes
from secateur.pipeline.search.candidates import Judge, Judging, Reference
from secateur.pipeline.search.ray_workers import ray_judging
from secateur.pipeline.search.supernet import Supernet, build_supernet
from secateur.pipeline.state import Run
from secateur.structure.base import SearchMethod
from secateur.structure.levels import Ladder, ladders

__all__ = ["SEARCH", "Search"]

SEARCH = "search.json"
HELD_OUT_TOKENS = 8192
RESIDENT_FRACTION = 0.4

References = dict[str, Reference]


class Search:
    """Its state is the record, which is on disk after every generation: a killed search goes on from there.

    Args:
        groups: block and units of every kind that may go.
        removed: how many of each go where the search starts.

    Attributes:
        record: what was searched: an entry an iteration with the steps of all groups, the best of every
            generation, the levels found, and the fitness of start and end on held-out text.
    """

    def __init__(
        self, run: Run, method: SearchMethod, groups: Sequence[tuple[int, Units]], removed: Sequence[int]
    ) -> None:
        self._run, self._method, self._groups, self._removed = run, method, groups, removed
        self._path = run.scratch / SEARCH
        self.record: dict[str, Any] = {"fitness": method.fitness, "iterations": []}
        if self._path.exists():
            self.record = json.loads(self._path.read_text(encoding="utf-8"))

    def found(self) -> tuple[Supernet, Levels]:
        """The supernet of the last iteration, and the levels in it; searches for what the record lacks."""
        references: References = {}
        removed, last = self._removed, (self._method.iterations if self._method.generations else 1) - 1
        for number in range(last + 1):
            steps = ladders(self._groups, removed, number, self._method)
            supernet, row = Supernet(self._folder(number), steps), self._row(number, steps)
            if "levels" not in row or number == last:
                build_supernet(self._run, self._method, supernet)
                self._forget(number - 1)
            if "levels" not in row:
                references = references or self._references()
                with _judging(self._run, self._method, supernet, references) as judge:
                    self._iterate(number, steps, judge, references)
            levels = tuple(row["levels"])
            removed = [step.removed_at(level) for step, level in zip(steps, levels, strict=True)]
        return supernet, levels

    def warnings(self) -> list[str]:
        """What held-out text says against the search."""
        rows = [row["held_out"] for row in self.record["iterations"] if row["held_out"]]
        if not rows or rows[-1]["found"] <= rows[0]["start"]:
            return []
        return [
            f"The search raised the {self._method.fitness} of held-out text from {rows[0]['start']:.4g} to "
            f"{rows[-1]['found']:.4g}: judge candidates on more tokens, or use -O generations=0."
        ]

    def _row(self, number: int, steps: Sequence[Ladder]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.record["iterations"]
        if number == len(rows):
            groups = [step.summary() for step in steps]
            rows.append({"groups": groups, "generations": [], "held_out": None})
        return rows[number]

    def _iterate(self, number: int, steps: Sequence[Ladder], judge: Judging, references: References) -> None:
        """The generations that the record does not have, and what held-out text says of the best."""
        method, row = self._method, self.record["iterations"][number]
        done = [Generation(**{**old, "levels": tuple(old["levels"])}) for old in row["generations"]]
        seed = f"{self._run.recipe.seed}/{number}"
        evolution = Evolution(
            [step.gene for step in steps],
            offspring=method.offspring,
            survivors=method.survivors,
            swaps=method.swaps,
            seed=seed,
        )
        evaluate = self._evaluate(seed, judge, references)
        best = done[-1].levels if done else (0,) * len(steps)
        with self._run.progress.task(f"searching, iteration {number + 1}", method.generations) as task:
            task.advance(len(done))
            for generation in evolution.run(evaluate, method.generations, done):
                best = generation.levels
                row["generations"].append(asdict(generation))
                self._save()
                task.advance(note=f"{method.fitness} {generation.fitness:.4g}")
        if "held_out" in references:
            rows = range(len(references["held_out"].windows))
            start, found = judge([(0,) * len(steps), best], "held_out", rows)
            row["held_out"] = {"start": start, "found": found}
        row["levels"] = list(best)
        self._save()

    def _evaluate(self, seed: str, judge: Judging, references: References) -> Evaluate:
        """Every stage of every generation draws windows of its own, as many as its tokens fill."""
        windows = references["search"].windows

        def evaluate(candidates: Sequence[Levels], generation: int, stage: int) -> list[float]:
            wanted = min(max(1, self._method.tokens[stage] // windows.length), len(windows))
            chance = random.Random(f"{seed}/{generation}/{stage}")
            return judge(candidates, "search", sorted(chance.sample(range(len(windows)), wanted)))

        return evaluate

    def _references(self) -> References:
        """What candidates are judged on: the calibration windows, and some that nothing is chosen by."""
        run, texts = self._run, {"search": self._run.data.calibration}
        if run.data.evaluation is not None:
            count = max(1, HELD_OUT_TOKENS // run.data.evaluation.length)
            texts["held_out"] = next(run.data.evaluation.batches(count))
        if self._method.fitness == "perplexity":
            return {name: Reference.of_text(windows) for name, windows in texts.items()}
        source = run.opened.source(run.device, run.dtype)
        return {
            name: Reference.of_model(source, windows, self._method.topk) for name, windows in texts.items()
        }

    def _folder(self, number: int) -> Path:
        return self._run.scratch / f"supernet-{number}"

    def _forget(self, number: int) -> None:
        if self._run.writer:
            rmtree(self._folder(number), ignore_errors=True)

    def _save(self) -> None:
        if self._run.writer:
            write_bytes(self._path, json.dumps(self.record).encode())


@contextmanager
def _judging(run: Run, method: SearchMethod, supernet: Supernet, references: References) -> Iterator[Judging]:
    """A judge in this process, in all that `torchrun` started, or in those of Ray."""
    resident = _fits(run, supernet, max(1, method.workers))
    if method.workers:
        where = run.opened.folder, run.device, run.dtype
        with ray_judging(method.workers, *where, supernet, references, resident=resident) as judge:
            yield judge
        return
    source = run.opened.source(run.device, run.dtype)
    own = Judge(source, supernet, references, resident=resident)
    yield _shared(own, run.group) if run.group else own


def _shared(judge: Judging, group: Group) -> Judging:
    """Every process judges its part of the candidates, and all learn the results."""

    def together(candidates: Sequence[Levels], name: str, rows: Sequence[int]) -> list[float]:
        losses = torch.zeros(len(candidates), dtype=torch.float64)
        part = slice(group.rank, None, group.world)
        losses[part] = torch.tensor(judge(candidates[part], name, rows), dtype=torch.float64)
        group.all_reduce(losses)
        return losses.tolist()

    return together


def _fits(run: Run, supernet: Supernet, processes: int) -> bool:
    """Whether the blocks and all their versions may stay in memory, in each of so many processes."""
    blocks = run.opened.anatomy.blocks
    files = sum(supernet.path(block.index).stat().st_size for block in blocks)
    own = run.opened.anatomy.block_parameters * run.dtype.itemsize
    return processes * (files + own) < RESIDENT_FRACTION * available_memory_bytes()
