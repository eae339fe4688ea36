"""A narrower model: observe the dense one, choose widths, keep the most important of each everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.anatomy.cut import cut_block, cut_outer, cut_shapes, space_parameters
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resized import is_stock, resized_config
from secateur.anatomy.resolve import resolve_config
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.source import BlockSource, SkeletonSource
from secateur.core.errors import AnatomyError, RecipeError
from secateur.core.statistics import BACKWARD
from secateur.evaluation.quality import perplexity
from secateur.pipeline.matrices import statistics_of
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.sizes import FileSizes, sizes_of
from secateur.pipeline.state import SCORES, Outcome, Run
from secateur.pipeline.ways.unit_gradients import stream_gradients, windows_of
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer
from secateur.structure.base import WidthMethod
from secateur.structure.widths import (
    TOLERANCE,
    Dimension,
    Widths,
    candidates,
    dimensions,
    evenest,
    freed,
    largest,
)

__all__ = ["check_width", "keep", "on_top", "prune_width", "width_sizes"]

LEAST_KEPT = 0.6
"""Of every dimension, in a search: the paper removes at most 40% of a width."""
TRIES = 256
"""Candidates that are tried on the configuration class before a request is refused."""


def check_width(opened: Opened, method: WidthMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share that no legal widths come near.
        AnatomyError: a model whose blocks differ, or lack what is to shrink.
    """
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}", "a method that ranks single units", "leave --scores out"
        )
    _proposals(opened, method, recipe.resolved_sparsity)


def width_sizes(opened: Opened, method: WidthMethod, recipe: Recipe) -> FileSizes:
    """What the run will write; with `search` the most promising of what it will try."""
    chosen = dimensions(opened.anatomy, method.widths, method.multiples)
    proposals = _proposals(opened, method, recipe.resolved_sparsity)
    layout = _Narrow(opened, chosen, proposals[0], {}).layout
    share = freed(opened.anatomy, chosen, proposals[0]) / opened.anatomy.block_parameters
    return sizes_of(opened, layout, share, exact=len(proposals) == 1)


def prune_width(run: Run, method: WidthMethod) -> Outcome:
    """Write all blocks, and what stands outside of them, at the chosen widths."""
    anatomy = run.opened.anatomy
    chosen = dimensions(anatomy, method.widths, method.multiples)
    if method.statistics & BACKWARD:
        found = _felt(run, method, chosen)
    else:
        found = run.remembered(lambda: _observe(run, method, chosen))
    proposals = _proposals(run.opened, method, run.recipe.resolved_sparsity)
    widths, tried = _best(run, chosen, found, proposals)
    narrow = _Narrow(run.opened, chosen, widths, found)
    done = run.finished()
    with run.progress.task("cutting", len(anatomy.blocks)) as task:
        for block in anatomy.blocks:
            if block.index not in done:
                tensors = narrow.layout.disassemble(block.index, narrow.block(block.index))
                run.keep(block.index, tensors, {})
            task.advance()
    return Outcome(
        layers=[_row(run, block.index, one, widths) for block in anatomy.blocks for one in chosen],
        blocks=[Block(block=block.index) for block in anatomy.blocks],
        sparsity=freed(anatomy, chosen, widths) / anatomy.block_parameters,
        config_updates=narrow.config_updates,
        outer=narrow.outer_files,
        files={SCORES: save({name: tensor.contiguous() for name, tensor in found.items()})},
        warnings=tried,
    )


def _proposals(opened: Opened, method: WidthMethod, sparsity: float) -> list[Widths]:
    """The widths to use, or with `search` those to try: all of them give the class of the dense model.

    Raises:
        RecipeError: none is near the budget.
    """
    chosen = dimensions(opened.anatomy, method.widths, method.multiples)
    found = candidates(opened.anatomy, chosen, sparsity, LEAST_KEPT if method.search else 0.0)
    wanted = largest(found, sparsity) if method.search else evenest(found, chosen, sparsity)
    legal = (one for one in islice(wanted, TRIES) if _is_legal(opened, chosen, one[0]))
    proposals = list(islice(legal, method.search or 1))
    if not proposals or (not method.search and abs(proposals[0][1] - sparsity) > 2 * TOLERANCE):
        shares = [share for _, share in proposals] or _shares_alone(opened, chosen[-1], sparsity)
        near = sorted({round(share, 3) for share in shares}, key=lambda share: abs(share - sparsity))
        raise RecipeError(
            f"sparsity {sparsity:g} by {', '.join(method.widths)} alone, in the multiples asked for",
            f"a share that legal widths make, such as {', '.join(map(str, near[:3])) or 'none'}",
            f"choose another --sparsity, or finer multiples (see: secateur methods {method.id})",
        )
    return [widths for widths, _ in proposals]


def _shares_alone(opened: Opened, one: Dimension, sparsity: float) -> list[float]:
    """The legal shares next to this one when a single width shrinks."""
    anatomy = opened.anatomy
    shares = {
        count: freed(anatomy, [one], {one.name: count}) / anatomy.block_parameters
        for count in one.choices()
        if count < one.count
    }
    nearest = sorted(shares, key=lambda count: abs(shares[count] - sparsity))
    legal = (count for count in nearest[:TRIES] if _is_legal(opened, [one], {one.name: count}))
    return [shares[count] for count in islice(legal, 3)]


def _is_legal(opened: Opened, chosen: list[Dimension], widths: Widths) -> bool:
    config = opened.checkpoint.config
    try:
        updates = _config_updates(opened, chosen, widths)
    except AnatomyError:
        return False
    return is_stock({**config, **updates}) == is_stock(config)


def _config_updates(opened: Opened, chosen: list[Dimension], widths: Widths) -> dict[str, Any]:
    """Keys of config.json; sizes that follow from the hidden size unless they are stated are stated."""
    anatomy = opened.anatomy
    inside = {"ffn": anatomy.spaces["ffn"]} if "ffn" in anatomy.spaces else {}
    whole: dict[str, int] = {}
    for one in chosen:
        (whole if one.units is None else inside).update(one.sizes(widths[one.name]))
    shapes = [cut_shapes(block, {**inside, **whole}) for block in anatomy.blocks]
    return resized_config(opened.checkpoint.config, anatomy, [inside] * len(shapes), shapes, whole=whole)


def _observe(run: Run, method: WidthMethod, chosen: list[Dimension]) -> dict[str, Tensor]:
    """Importance of the entries of the residual stream (`hidden`, summed over all that read it) and of those
    of the matrices that collect units (`3.ffn`, `3.heads`), from one pass over the dense model."""
    found: dict[str, Tensor] = {}
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in run.driver().blocks(outputs=False):
            for name, scores in _observe_block(opened, method, chosen).items():
                found[name] = found[name] + scores if name in found else scores
            opened.finish()
            task.advance()
    return found


def _felt(run: Run, method: WidthMethod, chosen: list[Dimension]) -> dict[str, Tensor]:
    """Importance of the hidden dimensions by what the loss feels of them. In several rounds that of those
    which are left is of the narrower model, and counts on top of that of all that went."""
    anatomy, found, kept = run.opened.anatomy, dict[str, Tensor](), torch.arange(0)
    for number in range(method.looks):
        source: BlockSource = run.opened.source(run.device, run.dtype)
        if number:
            near = _near(run.opened, chosen, run.recipe.resolved_sparsity * number / method.looks)
            kept = keep(chosen[0], found["hidden"], near["hidden"])["hidden"]
            source = _NarrowSource(_Narrow(run.opened, chosen, near, found), run.device, run.dtype)

        def find(source: BlockSource = source, number: int = number) -> dict[str, Tensor]:
            windows = windows_of(run, number, method.windows_a_look)
            windows = windows.shard(run.group.rank, run.group.world) if run.group else windows
            driver = Driver(source, windows, group=run.group)
            return {"hidden": method.rank(stream_gradients(driver, method, run.scratch, run.progress))}

        felt = run.remembered(find, f"round-{number}.safetensors")["hidden"]
        found = {"hidden": on_top(found["hidden"], kept, felt) if number else felt}
    assert len(found["hidden"]) == anatomy.spaces["hidden"]
    return found


def on_top(before: Tensor, kept: Tensor, after: Tensor) -> Tensor:
    """Scores of all from those of a round before: what was kept has new ones, above all that went."""
    found = before.clone()
    gone = torch.ones(len(before), dtype=torch.bool)
    gone[kept] = False
    found[kept] = after + (1 + before[gone].max() if bool(gone.any()) else 0)
    return found


def _near(opened: Opened, chosen: list[Dimension], sparsity: float) -> Widths:
    """Legal widths on the way to a budget, as near to this one as there are."""
    found = evenest(candidates(opened.anatomy, chosen, sparsity), chosen, sparsity)
    legal = (widths for widths, _ in islice(found, TRIES) if _is_legal(opened, chosen, widths))
    return next(legal, {one.name: one.count for one in chosen})


def _observe_block(opened: OpenBlock, method: WidthMethod, chosen: list[Dimension]) -> dict[str, Tensor]:
    block, names = opened.block, {one.name for one in chosen}
    writers = {one.name: one.units.writer for one in chosen if one.units is not None}
    stream = [
        matrix.input
        for matrix in block.matrices
        if "hidden" in names and [segment.space for segment in matrix.columns.segments] == ["hidden"]
    ]
    sites = {*stream, *(writer.input for writer in writers.values())}
    observed = opened.observe(method.statistics, sites=sites, record_output=False)
    found = {
        f"{opened.index}.{name}": method.importance(statistics_of(writer, observed)).cpu()
        for name, writer in writers.items()
    }
    if stream:
        scores = [method.importance(observed[site][0]).cpu() for site in dict.fromkeys(stream)]
        found["hidden"] = torch.stack(scores).sum(0)
    return found


def _best(
    run: Run, chosen: list[Dimension], found: dict[str, Tensor], proposals: list[Widths]
) -> tuple[Widths, list[str]]:
    """The proposal under which the calibration text is likeliest, and what was tried, in words."""
    if len(proposals) == 1:
        return proposals[0], []
    scored: list[tuple[float, int]] = []
    with run.progress.task("trying widths", len(proposals)) as task:
        for number, widths in enumerate(proposals):
            source = _NarrowSource(_Narrow(run.opened, chosen, widths, found), run.device, run.dtype)
            batch_size = run.recipe.calibration.batch_size
            scored.append((perplexity(source, run.data.calibration, batch_size=batch_size), number))
            task.advance()
    lines = [
        f"{', '.join(f'{name} {size}' for name, size in proposals[number].items())}: {value:.4g}"
        for value, number in scored
    ]
    return proposals[min(scored)[1]], [f"Perplexity of the calibration text by widths: {'; '.join(lines)}."]


class _Narrow:
    """The model at some widths, cut out of the dense one block by block.

    Attributes:
        config_updates: keys of config.json that change.
        layout: of its files.
    """

    def __init__(
        self, opened: Opened, chosen: list[Dimension], widths: Widths, found: Mapping[str, Tensor]
    ) -> None:
        self.opened = opened
        self.config_updates = _config_updates(opened, chosen, widths)
        self.config = {**opened.checkpoint.config, **self.config_updates}
        self.layout = FileLayout(resolve_config(self.config), dict.fromkeys(opened.checkpoint.tensors))
        self._chosen, self._widths, self._found = chosen, widths, found

    def block(self, index: int) -> dict[str, Tensor]:
        """In-memory tensors of a block."""
        layout, kept = self.opened.layout, self._kept(None)
        whole = layout.assemble(index, self.opened.checkpoint.read(layout.block_names(index)))
        return cut_block(self.opened.anatomy.blocks[index], whole, {**kept, **self._kept(index)})

    def outer(self, files: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands outside the blocks, by full name, from the files of the dense model."""
        whole = self.opened.layout.assemble_outer(files)
        return cut_outer(self.opened.anatomy, whole, self._kept(None))

    def outer_files(self, files: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same by names on disk."""
        return self.layout.disassemble_outer(self.outer(files))

    def _kept(self, index: int | None) -> dict[str, Tensor]:
        """What stays of the spaces inside block `index`, or for None of the residual stream; the most
        important first."""
        kept: dict[str, Tensor] = {}
        for one in self._chosen:
            if (one.units is None) != (index is None):
                continue
            scores = self._found[one.name if index is None else f"{index}.{one.name}"]
            kept |= keep(one, scores, self._widths[one.name])
        return kept


def keep(dimension: Dimension, scores: Tensor, count: int) -> dict[str, Tensor]:
    """By space, the entries that stay, the most important first; of query heads as many in every group.

    Args:
        scores: one number an entry of the residual stream, or a column of the matrix that collects units;
            that of a head is the root of the sum of squares over its columns (structured-baselines, 2.6).
    """
    units = scores.double().view(dimension.groups, dimension.count, -1).norm(dim=-1)
    first = units.argsort(dim=1, descending=True, stable=True)[:, :count]
    numbers = (first + torch.arange(dimension.groups)[:, None] * dimension.count).flatten()
    widths = {space: entries // dimension.groups for space, entries in dimension.spaces.items()}
    return {
        space: (numbers[:, None] * width + torch.arange(width)).flatten() for space, width in widths.items()
    }


class _NarrowSource(SkeletonSource):
    """Blocks of a narrower model, cut when they are opened."""

    def __init__(self, narrow: _Narrow, device: torch.device, dtype: torch.dtype) -> None:
        self._narrow = narrow
        super().__init__(CONFIG_MAPPING[narrow.config["model_type"]].from_dict(narrow.config), device, dtype)

    def in_dtype(self, dtype: torch.dtype) -> _NarrowSource:
        return self if dtype == self.dtype else _NarrowSource(self._narrow, self.device, dtype)

    def _outer_tensors(self, head: bool) -> dict[str, Tensor]:
        opened = self._narrow.opened
        whole = self._narrow.outer(opened.checkpoint.read(opened.layout.outer_names()))
        own = f"{self.anatomy.head}."
        apart = [name for name in whole if name.startswith(own) and name not in self.anatomy.tied]
        return {name: tensor for name, tensor in whole.items() if (name in apart) == head}

    def _block_tensors(self, index: int) -> dict[str, Tensor]:
        return self._narrow.block(index)


def _row(run: Run, index: int, dimension: Dimension, widths: Widths) -> Layer:
    block, groups = run.opened.anatomy.blocks[index], dimension.groups
    return Layer(
        block=index,
        matrix=dimension.name,
        rows=dimension.count * groups,
        columns=space_parameters(block, dimension.sizes(1)) // groups,
        sparsity_requested=run.recipe.resolved_sparsity,
        sparsity=1 - widths[dimension.name] / dimension.count,
    )
