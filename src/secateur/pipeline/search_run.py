"""Search how many units go where: prune at all levels, let candidates compete, repeat in finer steps, cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.resized import is_stock
from secateur.checkpoint.durable import write_bytes
from secateur.core.errors import RecipeError
from secateur.core.evolution import Evolution, Generation, Levels, swapped
from secateur.evaluation.memory import available_memory_bytes
from secateur.pipeline.candidates import Judge, Reference
from secateur.pipeline.cutting import Choice, Cutter
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.structure_run import UNEQUAL, check_sizes, equal_shares, groups_of
from secateur.pipeline.supernet import Supernet, build_supernet
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored
from secateur.structure.base import SearchMethod
from secateur.structure.levels import Ladder, ladders

__all__ = ["SEARCH", "check_search", "prune_search"]

SEARCH = "search.json"
HELD_OUT_TOKENS = 8192
RESIDENT_FRACTION = 0.4

Judging = Callable[[Sequence[Levels], str, Sequence[int]], list[float]]


def check_search(opened: Opened, method: SearchMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: options that do not fit together, or a share that cannot be removed.
        AnatomyError: a family whose blocks cannot have the sizes.
    """
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}", "a method that scores units once", "leave --scores out"
        )
    stages = len(method.tokens)
    if len(method.survivors) != stages - 1:
        raise RecipeError(
            f"{len(method.survivors)} numbers of survivors and {stages} of tokens",
            f"{stages - 1} numbers of survivors, one a stage but the last",
            "give both: -O tokens=[512,2048] -O survivors=[4]",
        )
    groups = groups_of(opened, method)
    kept = equal_shares(opened, groups, method, recipe.resolved_sparsity)
    check_sizes(opened, groups, kept)
    steps = ladders(groups, _removed(groups, kept), 0, method)
    moved = swapped([ladder.gene for ladder in steps], (0,) * len(steps), random.Random(0))
    if method.generations:
        counts = [ladder.removed_at(level) for ladder, level in zip(steps, moved, strict=True)]
        check_sizes(
            opened,
            groups,
            [torch.arange(units.count - n) for (_, units), n in zip(groups, counts, strict=True)],
        )


def prune_search(run: Run, method: SearchMethod) -> Outcome:
    """Search, then cut by what was found; the search is kept beside the result."""
    search = _Search(run, method)
    supernet, levels = search.run()
    choices = []
    for ladder, level in zip(supernet.ladders, levels, strict=True):
        kept = supernet.read(ladder.block)[ladder.units.kind][level].kept
        choices.append(Choice(Scored(ladder.block, ladder.units, torch.empty(0)), None, kept))
    cutter = Cutter(run, method, choices)
    layers, rows = cutter.cut()
    freed = sum(len(choice.removed) * choice.units.parameters for choice in choices)
    stock = is_stock({**run.opened.checkpoint.config, **cutter.config_updates})
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=freed / sum(block.size for block in run.opened.anatomy.blocks),
        config_updates=cutter.config_updates,
        files={SEARCH: json.dumps(search.record, indent=1) + "\n"},
        warnings=[*search.warnings(), *([] if stock else [UNEQUAL])],
    )


class _Search:
    """The state is what stands in the record; it is kept after every generation.

    Attributes:
        record: a row an iteration, with its steps, its generations, and the fitness on held-out text.
    """

    def __init__(self, run: Run, method: SearchMethod) -> None:
        self.run_, self.method = run, method
        self.groups = groups_of(run.opened, method)
        self.record: dict[str, Any] = {"fitness": method.fitness, "iterations": []}
        self._path = run.scratch / SEARCH
        if self._path.exists():
            self.record = json.loads(self._path.read_text(encoding="utf-8"))

    def run(self) -> tuple[Supernet, Levels]:
        """The supernet of the last iteration and the levels found in it."""
        sparsity = self.run_.recipe.resolved_sparsity
        removed = _removed(self.groups, equal_shares(self.run_.opened, self.groups, self.method, sparsity))
        references: dict[str, Reference] = {}
        for number in range(self.method.iterations):
            supernet = Supernet(self._folder(number), ladders(self.groups, removed, number, self.method))
            row = self._row(number, supernet.ladders)
            last = number == self.method.iterations - 1
            if "levels" not in row or last:
                build_supernet(self.run_, self.method, supernet)
            if "levels" not in row:
                references = references or self._references()
                self._iterate(number, supernet, references, row)
                self._forget(number - 1)
            levels = tuple(row["levels"])
            removed = [step.removed_at(level) for step, level in zip(supernet.ladders, levels, strict=True)]
        return supernet, levels

    def warnings(self) -> list[str]:
        """What held-out text says against the search."""
        rows = [row["held_out"] for row in self.record["iterations"] if row["held_out"]]
        if not rows or rows[-1]["found"] <= rows[0]["start"]:
            return []
        return [
            f"The search raised the {self.method.fitness} of held-out text from {rows[0]['start']:.4g} to "
            f"{rows[-1]['found']:.4g}: judge candidates on more tokens, or use -O generations=0."
        ]

    def _row(self, number: int, steps: Sequence[Ladder]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.record["iterations"]
        if number == len(rows):
            groups = [
                {
                    "block": s.block,
                    "kind": s.units.kind,
                    "units": s.units.count,
                    "removed": s.removed,
                    "step": s.step,
                }
                for s in steps
            ]
            rows.append({"groups": groups, "generations": [], "held_out": None})
        return rows[number]

    def _iterate(
        self, number: int, supernet: Supernet, references: dict[str, Reference], row: dict[str, Any]
    ) -> None:
        """Search in one supernet; the record has the generations that are done."""
        method, found = (
            self.method,
            [Generation(**{**old, "levels": tuple(old["levels"])}) for old in row["generations"]],
        )
        evolution = Evolution(
            [ladder.gene for ladder in supernet.ladders],
            offspring=method.offspring,
            survivors=method.survivors,
            swaps=method.swaps,
            seed=f"{self.run_.recipe.seed}/{number}",
        )
        start = (0,) * len(supernet.ladders)
        title = f"searching, step {number + 1} of {method.iterations}"
        with _judging(self.run_, method, supernet, references) as judge:
            with self.run_.progress.task(title, method.generations) as task:
                task.advance(len(found))
                for best in evolution.run(
                    self._evaluate(judge, references, number), method.generations, found
                ):
                    found.append(best)
                    row["generations"].append(asdict(best))
                    self._save()
                    task.advance(note=f"{method.fitness} {best.fitness:.4g}")
            levels = found[-1].levels if found else start
            if "held_out" in references:
                rows = range(len(references["held_out"].windows))
                before, after = judge([start, levels], "held_out", rows)
                row["held_out"] = {"start": before, "found": after}
        row["levels"] = list(levels)
        self._save()

    def _evaluate(
        self, judge: Judging, references: dict[str, Reference], number: int
    ) -> Callable[[Sequence[Levels], int, int], list[float]]:
        windows = references["search"].windows

        def evaluate(candidates: Sequence[Levels], generation: int, stage: int) -> list[float]:
            wanted = min(max(1, self.method.tokens[stage] // windows.length), len(windows))
            chance = random.Random(f"{self.run_.recipe.seed}/{number}/{generation}/{stage}")
            return judge(candidates, "search", sorted(chance.sample(range(len(windows)), wanted)))

        return evaluate

    def _references(self) -> dict[str, Reference]:
        """What candidates are judged on: the calibration windows, and some that nothing is chosen by."""
        data = self.run_.data
        found = {"search": data.calibration}
        if data.evaluation is not None:
            found["held_out"] = next(
                data.evaluation.batches(max(1, HELD_OUT_TOKENS // data.evaluation.length))
            )
        if self.method.fitness == "perplexity":
            return {name: Reference.of_text(windows) for name, windows in found.items()}
        source = self.run_.opened.source(self.run_.device, self.run_.dtype)
        return {
            name: Reference.of_model(source, windows, self.method.topk) for name, windows in found.items()
        }

    def _folder(self, number: int) -> Path:
        return self.run_.scratch / f"supernet-{number}"

    def _forget(self, number: int) -> None:
        if self.run_.writer:
            rmtree(self._folder(number), ignore_errors=True)

    def _save(self) -> None:
        if self.run_.writer:
            write_bytes(self._path, json.dumps(self.record).encode())


@contextmanager
def _judging(
    run: Run, method: SearchMethod, supernet: Supernet, references: dict[str, Reference]
) -> Iterator[Judging]:
    """A judge in this process."""
    source = run.opened.source(run.device, run.dtype)
    yield Judge(source, supernet, references, resident=fits(run, supernet))


def fits(run: Run, supernet: Supernet) -> bool:
    """Whether the blocks and all their versions may stay in memory."""
    blocks = run.opened.anatomy.blocks
    files = sum(supernet.path(block.index).stat().st_size for block in blocks)
    own = run.opened.anatomy.block_parameters * run.dtype.itemsize
    return files + own < RESIDENT_FRACTION * available_memory_bytes()


def _removed(groups: Sequence[tuple[int, Any]], kept: Sequence[Tensor]) -> list[int]:
    return [units.count - len(stays) for (_, units), stays in zip(groups, kept, strict=True)]
