"""Cut all blocks of a model by the units that were chosen, make up for them, and write what stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.cut import cut_block, expand_block
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.units import Units, kept_spaces
from secateur.calibration.driver import OpenBlock
from secateur.checkpoint.writer import read_part
from secateur.core.statistics import InputStatistics
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.plans.draft import Draft
from secateur.pipeline.state import Run, part_name
from secateur.report.model import Block, Layer
from secateur.structure.allocation import Scored
from secateur.structure.base import UnitMethod, UnitProblem
from secateur.structure.compensation import DAMPING, mean_bias, refit

__all__ = ["Choice", "Cutter"]

AT_FLOOR = "cut down to the floor of `min_keep`: nothing more could go here"


@dataclass(frozen=True)
class Choice:
    """The units of one kind in one block, the mean of what they collect, and which of them stay (sorted)."""

    scored: Scored
    mean: Tensor | None
    kept: Tensor

    @property
    def units(self) -> Units:
        return self.scored.units

    @property
    def removed(self) -> Tensor:
        return self.units.others(self.kept)


class Cutter:
    """Knows the files that come out before a block is cut."""

    def __init__(self, run: Run, method: UnitMethod, choices: list[Choice], planned: Draft) -> None:
        self.run, self.method, self.sparsity = run, method, planned.sparsity
        self.blocks = run.opened.anatomy.blocks
        self.choices = [[choice for choice in choices if choice.scored.block == b.index] for b in self.blocks]
        self.kept = [dict(kept) for kept in planned.result.kept]
        self.floors, self.smaller = set(planned.floors()), planned.result.anatomy
        names = [*run.opened.checkpoint.tensors, *self._bias_names()]
        self.layout = FileLayout(self.smaller, dict.fromkeys(names))

    def cut(self) -> tuple[list[Layer], list[Block]]:
        """Write block after block; those of an interrupted run are done.

        Only least squares sees text again: inputs that passed through the blocks cut before.
        """
        refits = self.method.compensate == "least_squares"
        records: list[dict[str, Any]] = []
        done = self.run.finished()
        for index, earlier in done.items():
            kept = {kind: torch.tensor(units) for kind, units in earlier.get("kept", {}).items()}
            self._keep_instead(index, kept)
        driver = self.run.driver(read=self._reader(set(done)))
        with self.run.progress.task("refitting" if refits else "cutting", len(self.blocks)) as task:
            for opened in driver.blocks(forward=refits, outputs=False):
                record = done.get(opened.index)
                if record is not None:
                    opened.finish()
                else:
                    record = self._cut(opened, refits)
                records.append(record)
                task.advance()
        layers = [Layer.model_validate(row) for record in records for row in record["layers"]]
        return layers, [Block.model_validate(record["block"]) for record in records]

    def _cut(self, opened: OpenBlock, refits: bool) -> dict[str, Any]:
        started = time.perf_counter()
        planned = self.choices[opened.index]
        notes = self._refit(opened) if refits and planned else [{} for _ in planned]
        _, whole = self.run.as_stored(opened)
        smaller = cut_block(opened.block, whole, self.kept[opened.index])
        for name, shape in self.smaller.blocks[opened.index].parameters.items():
            if name not in smaller:
                smaller[name] = whole[f"{name.removesuffix('bias')}weight"].new_zeros(shape)
        for choice in self.choices[opened.index]:
            self._add_bias(choice, whole, smaller)
        loss = opened.finish()
        own = self.choices[opened.index]
        rows = [
            self._row(choice, note).model_dump(mode="json") for choice, note in zip(own, notes, strict=True)
        ]
        block = Block(block=opened.index, loss=loss, seconds=round(time.perf_counter() - started, 4))
        record = {"layers": rows, "block": block.model_dump(mode="json")}
        pairs = zip(planned, own, strict=True)
        if changed := {new.units.kind: new.kept.tolist() for old, new in pairs if new is not old}:
            record["kept"] = changed
        self.run.keep(opened.index, self.layout.disassemble(opened.index, smaller), record)
        return record

    def _refit(self, opened: OpenBlock) -> list[dict[str, float]]:
        """Least squares on the columns that stay, in place; the others become zero, which is what their
        removal means to the rest."""
        observed = opened.observe({"hessian"}, sites=self._sites(opened.index))
        notes = []
        for choice in self.choices[opened.index]:
            view = choice.units.writer.view(opened.parameters)
            statistics = statistics_of(choice.units.writer, observed)
            hessian = statistics.hessian
            assert hessian is not None
            kept = self._refined(opened, choice, view, statistics)
            columns = choice.units.columns(kept).to(view.device)
            new, damping = refit(view.float(), hessian, columns)
            with torch.no_grad():
                view.copy_(new)
            notes.append({"damping": damping} if damping > DAMPING else {})
        return notes

    def _refined(self, opened: OpenBlock, choice: Choice, weight: Tensor, inputs: InputStatistics) -> Tensor:
        """What stays after the method has looked again; the choice becomes that."""
        name = f"{opened.index}.{choice.units.kind}"
        generator = generator_for(self.run.recipe.seed, f"{name}.refine")
        problem = UnitProblem(name, choice.units, weight.float(), inputs, generator)
        kept = self.method.refine(problem, choice.kept)
        if not kept.equal(choice.kept):
            self._keep_instead(opened.index, {choice.units.kind: kept})
        return kept

    def _keep_instead(self, index: int, kept: Mapping[str, Tensor]) -> None:
        """Let other units of these kinds stay in a block."""
        own = self.choices[index]
        self.choices[index] = [
            replace(choice, kept=kept[choice.units.kind]) if choice.units.kind in kept else choice
            for choice in own
        ]
        for choice in self.choices[index]:
            self.kept[index] |= kept_spaces(choice.units, choice.kept)

    def _sites(self, index: int) -> set[str]:
        return {choice.units.writer.input for choice in self.choices[index]}

    def _add_bias(self, choice: Choice, dense: dict[str, Tensor], smaller: dict[str, Tensor]) -> None:
        """The mean of what is gone, on top of a bias that is there."""
        writer = choice.units.writer
        name = f"{writer.name}.bias"
        if self.method.compensate != "bias" or choice.mean is None:
            return
        weight = writer.view(dense)
        old = smaller[name]
        added = mean_bias(weight.float(), choice.mean, choice.units.columns(choice.removed))
        smaller[name] = (old.float() + added).to(old.dtype)

    def _row(self, choice: Choice, notes: dict[str, float]) -> Layer:
        units = choice.units
        name = f"{choice.scored.block}.{units.kind}"
        return Layer(
            block=choice.scored.block,
            matrix=units.kind,
            rows=units.count,
            columns=units.parameters,
            sparsity_requested=self.sparsity,
            sparsity=len(choice.removed) / units.count,
            notes=notes,
            fallbacks=[AT_FLOOR] if name in self.floors else [],
        )

    def _reader(self, done: set[int]) -> Callable[[int], dict[str, Tensor] | None]:
        """Blocks that were cut by an earlier run, with zeros where units are gone."""

        def read(index: int) -> dict[str, Tensor] | None:
            if index not in done:
                return None
            smaller = self.layout.assemble(index, read_part(self.run.out, part_name(index)))
            whole = expand_block(self.blocks[index], smaller, self.kept[index])
            return self.run.opened.layout.disassemble(index, whole)

        return read

    def _bias_names(self) -> list[str]:
        """Their names on disk, beside those of the weights."""
        pairs = zip(self.blocks, self.smaller.blocks, strict=True)
        added = {name for old, new in pairs for name in new.parameters.keys() - old.parameters.keys()}
        ends = tuple(f".{name.removesuffix('bias')}weight" for name in added)
        layout, indices = self.run.opened.layout, range(len(self.blocks))
        stored = (name for index in indices for name in layout.block_names(index))
        return [f"{name.removesuffix('weight')}bias" for name in stored if ends and name.endswith(ends)]
