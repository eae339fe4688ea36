"""Methods that search how many units go where: find it, then cut by what was found."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from secateur.anatomy.resized import is_stock
from secateur.core.errors import RecipeError
from secateur.core.evolution import swapped
from secateur.pipeline.cutting import Choice, Cutter
from secateur.pipeline.opened import Opened
from secateur.pipeline.ray_workers import ray_running, require_ray
from secateur.pipeline.searching import SEARCH, Search
from secateur.pipeline.state import UNEQUAL, Outcome, Run
from secateur.pipeline.structure_run import check_sizes, equal_shares, groups_of
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored
from secateur.structure.base import SearchMethod
from secateur.structure.levels import ladders
from secateur.structure.units import Units

__all__ = ["check_search", "prune_search"]


def check_search(opened: Opened, method: SearchMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: options that do not fit together, or a share that cannot be removed.
        AnatomyError: a family whose blocks cannot have the sizes.
        MissingExtraError: workers without Ray.
    """
    _check_options(method, recipe)
    groups = groups_of(opened, method)
    kept = equal_shares(opened, groups, method, recipe.resolved_sparsity)
    check_sizes(opened, groups, kept)
    if method.generations:  # the blocks will differ
        steps = ladders(groups, _removed(groups, kept), 0, method)
        moved = swapped([step.gene for step in steps], (0,) * len(steps), random.Random(0))
        removed = [step.removed_at(level) for step, level in zip(steps, moved, strict=True)]
        left = [torch.arange(units.count - n) for (_, units), n in zip(groups, removed, strict=True)]
        check_sizes(opened, groups, left)


def _check_options(method: SearchMethod, recipe: Recipe) -> None:
    stages = len(method.tokens)
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}", "a method that scores units once", "leave --scores out"
        )
    if len(method.survivors) != stages - 1:
        raise RecipeError(
            f"{len(method.survivors)} numbers of survivors and {stages} of tokens",
            "survivors of each stage but the last",
            "give both: -O tokens=[512,2048] -O survivors=[4]",
        )
    if method.workers and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"{method.workers} workers under torchrun", "one of the two", "leave -O workers out"
        )
    if method.workers:
        require_ray()


def prune_search(run: Run, method: SearchMethod) -> Outcome:
    """Search, then cut; the record of the search is kept beside the result."""
    groups = groups_of(run.opened, method)
    kept = equal_shares(run.opened, groups, method, run.recipe.resolved_sparsity)
    search = Search(run, method, groups, _removed(groups, kept))
    with ray_running(method.workers) if method.workers else nullcontext():
        supernet, levels = search.found()
    choices = [
        Choice(Scored(ladder.block, ladder.units, torch.empty(0)), None, supernet.kept(ladder, level))
        for ladder, level in zip(supernet.ladders, levels, strict=True)
    ]
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


def _removed(groups: Sequence[tuple[int, Units]], kept: Sequence[Tensor]) -> list[int]:
    return [units.count - len(stays) for (_, units), stays in zip(groups, kept, strict=True)]
