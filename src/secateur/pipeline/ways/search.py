"""Methods that search how many units go where: find it, then cut by what was found."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from secateur.anatomy.units import Units
from secateur.core.errors import RecipeError
from secateur.core.evolution import swapped
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.draft import Draft, groups_of
from secateur.pipeline.plans.result import Result
from secateur.pipeline.search.ray_workers import ray_running, require_ray
from secateur.pipeline.search.searching import SEARCH, Search
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.ways.cutting import Choice, Cutter
from secateur.pipeline.ways.structure import outcome_of
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import SearchMethod
from secateur.structure.levels import ladders

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
    kept = _equal_shares(opened, groups, method, recipe.resolved_sparsity)
    _ = Result.of(opened, groups, kept, []).config_updates
    if method.generations:  # the blocks will differ
        steps = ladders(groups, _removed(groups, kept), 0, method)
        moved = swapped([step.gene for step in steps], (0,) * len(steps), random.Random(0))
        removed = [step.removed_at(level) for step, level in zip(steps, moved, strict=True)]
        left = [torch.arange(units.count - n) for (_, units), n in zip(groups, removed, strict=True)]
        _ = Result.of(opened, groups, left, []).config_updates


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
    if method.uniform:
        raise RecipeError(
            f"uniform with method {method.id!r}",
            "a method that does not search for what differs",
            "leave it out, or stay with equal shares: -O generations=0",
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
    start = _equal_shares(run.opened, groups, method, run.recipe.resolved_sparsity)
    search = Search(run, method, groups, _removed(groups, start))
    with ray_running(method.workers) if method.workers else nullcontext():
        supernet, levels = search.found()
    pairs = list(zip(supernet.ladders, levels, strict=True))
    kept = [supernet.kept(ladder, level) for ladder, level in pairs]
    scored = [Scored(ladder.block, ladder.units, torch.empty(0)) for ladder in supernet.ladders]
    planned = Draft(run.opened, method, scored, kept, run.recipe.resolved_sparsity, None, None)
    choices = [Choice(group, None, stays) for group, stays in zip(scored, kept, strict=True)]
    layers, rows = Cutter(run, method, choices, planned).cut()
    outcome = outcome_of(run, planned, layers, rows, {SEARCH: json.dumps(search.record, indent=1) + "\n"})
    return replace(outcome, warnings=[*search.warnings(), *outcome.warnings])


def _equal_shares(
    opened: Opened, groups: Sequence[tuple[int, Units]], method: SearchMethod, sparsity: float
) -> list[Tensor]:
    """What stays of every group as long as all units are worth the same. Raises `RecipeError`."""
    flat = [Scored(index, units, torch.zeros(units.count)) for index, units in groups]
    sizes = [block.size for block in opened.anatomy.blocks]
    return allocate(flat, sizes, sparsity, method)


def _removed(groups: Sequence[tuple[int, Units]], kept: Sequence[Tensor]) -> list[int]:
    return [units.count - len(stays) for (_, units), stays in zip(groups, kept, strict=True)]
