"""Cut all blocks of a model by the units that were chosen, make up for them, and write what stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.cut import cut_block, cut_shapes, expand_block
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resized import resized_config
from secateur.anatomy.resolve import resolve_config
from secateur.calibration.driver import OpenBlock
from secateur.checkpoint.writer import read_part
from secateur.core.errors import RecipeError
from secateur.pipeline.matrices import statistics_of
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Run, part_name
from secateur.report.model import Block, Layer
from secateur.structure.allocation import Scored
from secateur.structure.base import UnitMethod
from secateur.structure.compensation import DAMPING, mean_bias, refit
from secateur.structure.units import Units, kept_spaces

__all__ = ["UNEQUAL", "Choice", "Cutter", "groups_of", "require_sizes"]

UNEQUAL = "Blocks differ in size: load it after `import secateur`, or with trust_remote_code=True."


def groups_of(opened: Opened, method: UnitMethod) -> list[tuple[int, Units]]:
    """Block and units of all that may go.

    Raises:
        RecipeError: there is nothing of that kind.
    """
    blocks = opened.anatomy.blocks
    competing = method.open_blocks(len(blocks))
    if not competing:
        raise RecipeError(
            f"protect_first={method.protect_first:g} and protect_last={method.protect_last:g}",
            f"shares that leave some of the {len(blocks)} blocks",
            "lower them",
        )
    groups = [(index, units) for index in competing for units in method.units(blocks[index])]
    if not groups:
        raise RecipeError(
            f"method {method.id!r} on {opened.anatomy.family!r}",
            "a model with channels or heads that one matrix collects",
            "prune single weights: wanda",
        )
    return groups


def require_sizes(opened: Opened, groups: Sequence[tuple[int, Units]], kept: Sequence[Tensor]) -> None:
    """Refuse, before anything is read, sizes that no class of this family can have. Raises `AnatomyError`."""
    blocks = opened.anatomy.blocks
    spaces: list[dict[str, int]] = [{} for _ in blocks]
    for (index, units), stays in zip(groups, kept, strict=True):
        spaces[index] |= {space: len(at) for space, at in kept_spaces(units, stays).items()}
    shapes = [cut_shapes(block, own) for block, own in zip(blocks, spaces, strict=True)]
    resized_config(opened.checkpoint.config, opened.anatomy, spaces, shapes)


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
    """Knows the files and the configuration that come out before a block is cut.

    Attributes:
        config_updates: keys of config.json that change.

    Raises:
        AnatomyError: sizes that no class of this family can have.
    """

    def __init__(self, run: Run, method: UnitMethod, choices: list[Choice]) -> None:
        self.run, self.method = run, method
        self.blocks = run.opened.anatomy.blocks
        self.choices = [[choice for choice in choices if choice.scored.block == b.index] for b in self.blocks]
        self.kept = [
            {space: at for choice in own for space, at in kept_spaces(choice.units, choice.kept).items()}
            for own in self.choices
        ]
        self.biases = self._new_biases()
        sizes = [{space: len(at) for space, at in kept.items()} for kept in self.kept]
        shapes = []
        for block, own in zip(self.blocks, sizes, strict=True):
            extra = {f"{name}.bias": (block.parameters[f"{name}.weight"][0],) for name in self.biases}
            shapes.append({**cut_shapes(block, own), **extra})
        checkpoint, anatomy = run.opened.checkpoint, run.opened.anatomy
        self.config_updates = resized_config(checkpoint.config, anatomy, sizes, shapes, self.biases)
        smaller = resolve_config({**checkpoint.config, **self.config_updates})
        self.layout = FileLayout(smaller, dict.fromkeys([*checkpoint.tensors, *self._bias_names()]))

    def cut(self) -> tuple[list[Layer], list[Block]]:
        """Write block after block; those of an interrupted run are done.

        Only least squares sees text again: inputs that passed through the blocks cut before.
        """
        refits = self.method.compensate == "least_squares"
        records: list[dict[str, Any]] = []
        done = self.run.finished()
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
        own = self.choices[opened.index]
        notes = self._refit(opened) if refits and own else [{} for _ in own]
        _, whole = self.run.as_stored(opened)
        smaller = cut_block(opened.block, whole, self.kept[opened.index])
        for choice in own:
            self._add_bias(choice, whole, smaller)
        for name in self.biases:  # blocks that are left whole have them too
            weight = smaller[f"{name}.weight"]
            smaller.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[0]))
        loss = opened.finish()
        rows = [
            self._row(choice, note).model_dump(mode="json") for choice, note in zip(own, notes, strict=True)
        ]
        block = Block(block=opened.index, loss=loss, seconds=round(time.perf_counter() - started, 4))
        record = {"layers": rows, "block": block.model_dump(mode="json")}
        self.run.keep(opened.index, self.layout.disassemble(opened.index, smaller), record)
        return record

    def _refit(self, opened: OpenBlock) -> list[dict[str, float]]:
        """Least squares on the columns that stay, in place; the others become zero, which is what their
        removal means to the rest."""
        observed = opened.observe({"hessian"}, sites=self._sites(opened.index))
        notes = []
        for choice in self.choices[opened.index]:
            view = choice.units.writer.view(opened.parameters)
            hessian = statistics_of(choice.units.writer, observed).hessian
            assert hessian is not None
            columns = choice.units.columns(choice.kept).to(view.device)
            new, damping = refit(view.float(), hessian, columns)
            with torch.no_grad():
                view.copy_(new)
            notes.append({"damping": damping} if damping > DAMPING else {})
        return notes

    def _sites(self, index: int) -> set[str]:
        return {choice.units.writer.input for choice in self.choices[index]}

    def _add_bias(self, choice: Choice, dense: dict[str, Tensor], smaller: dict[str, Tensor]) -> None:
        """The mean of what is gone, on top of a bias that is there."""
        writer = choice.units.writer
        name = f"{writer.name}.bias"
        if self.method.compensate != "bias" or choice.mean is None:
            return
        weight = writer.view(dense)
        old = smaller.get(name, weight.new_zeros(writer.shape[0]))
        added = mean_bias(weight.float(), choice.mean, choice.units.columns(choice.removed))
        smaller[name] = (old.float() + added).to(old.dtype)

    def _row(self, choice: Choice, notes: dict[str, float]) -> Layer:
        units = choice.units
        return Layer(
            block=choice.scored.block,
            matrix=units.kind,
            rows=units.count,
            columns=units.parameters,
            sparsity_requested=self.run.recipe.resolved_sparsity,
            sparsity=len(choice.removed) / units.count,
            notes=notes,
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

    def _new_biases(self) -> list[str]:
        """Matrices that get a bias which no block has yet, the same in all blocks."""
        if self.method.compensate != "bias":
            return []
        writers = {choice.units.writer.name for own in self.choices for choice in own}
        there = {name for block in self.blocks for name in block.parameters}
        return sorted(name for name in writers if f"{name}.bias" not in there)

    def _bias_names(self) -> list[str]:
        """Their names on disk, beside those of the weights."""
        ends = tuple(f".{name}.weight" for name in self.biases)
        layout, indices = self.run.opened.layout, range(len(self.blocks))
        stored = (name for index in indices for name in layout.block_names(index))
        return [f"{name.removesuffix('weight')}bias" for name in stored if ends and name.endswith(ends)]
