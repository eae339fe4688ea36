"""Whole units away: score all blocks, choose once, then cut and write block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.anatomy.cut import cut_shapes
from secateur.anatomy.resized import is_stock, resized_config
from secateur.calibration.driver import OpenBlock
from secateur.core.errors import InputError, RecipeError
from secateur.pipeline.cutting import Choice, Cutter
from secateur.pipeline.matrices import generator_for
from secateur.pipeline.opened import Opened
from secateur.pipeline.scores import NO_SCORES, origin_of, read_scores, scores_file
from secateur.pipeline.state import PREPARED, SCORES, UNEQUAL, Outcome, Run
from secateur.pipeline.unit_weights import UnitWeights, problems_of, shapes_of
from secateur.pipeline.watching import BlockWatch, across_ffn
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import StructureMethod
from secateur.structure.units import Units, kept_spaces

__all__ = [
    "check_sizes",
    "check_structure",
    "equal_shares",
    "groups_of",
    "prune_structure",
    "structure_observes",
]


def check_structure(opened: Opened, method: StructureMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share that cannot be removed, or that whole heads do not make.
        AnatomyError: a family whose blocks cannot have the sizes.
        InputError: scores of another model or method.
    """
    groups = groups_of(opened, method)
    check_sizes(opened, groups, equal_shares(opened, groups, method, recipe.resolved_sparsity))
    method.check(shapes_of(opened, method))
    if recipe.scores is not None:
        _given(opened, method, Path(recipe.scores))


def equal_shares(
    opened: Opened, groups: Sequence[tuple[int, Units]], method: StructureMethod, sparsity: float
) -> list[Tensor]:
    """What stays of every group as long as all units are worth the same. Raises `RecipeError`."""
    flat = [Scored(index, units, torch.zeros(units.count)) for index, units in groups]
    sizes = [block.size for block in opened.anatomy.blocks]
    return allocate(flat, sizes, sparsity, method, torch.zeros(len(sizes)))


def check_sizes(opened: Opened, groups: Sequence[tuple[int, Units]], kept: Sequence[Tensor]) -> None:
    """Raise `AnatomyError` for a family whose blocks cannot have these sizes."""
    blocks = opened.anatomy.blocks
    spaces: list[dict[str, int]] = [{} for _ in blocks]
    for (index, units), stays in zip(groups, kept, strict=True):
        spaces[index] |= {space: len(at) for space, at in kept_spaces(units, stays).items()}
    shapes = [cut_shapes(block, own) for block, own in zip(blocks, spaces, strict=True)]
    resized_config(opened.checkpoint.config, opened.anatomy, spaces, shapes)


def structure_observes(method: StructureMethod, recipe: Recipe) -> bool:
    """Whether scores, their spread or a refit look at calibration text."""
    scoring = bool(method.statistics) or method.spread == "sigmoid"
    return method.compensate == "least_squares" or (scoring and recipe.scores is None)


def prune_structure(run: Run, method: StructureMethod) -> Outcome:
    """Score, choose, cut. Scores are kept beside the result, to plan other ratios from."""
    blocks = run.opened.anatomy.blocks
    found, files = _scores(run, method)
    scored = [
        Scored(index, units, found[f"{index}.{units.kind}"]) for index, units in groups_of(run.opened, method)
    ]
    sizes = [block.size for block in blocks]
    kept = allocate(scored, sizes, run.recipe.resolved_sparsity, method, found.get(method.change))
    choices = [
        Choice(group, found.get(f"{group.block}.{group.units.kind}.mean"), stays)
        for group, stays in zip(scored, kept, strict=True)
    ]
    cutter = Cutter(run, method, choices)
    layers, rows = cutter.cut()
    freed = sum(len(choice.removed) * choice.units.parameters for choice in choices)
    stock = is_stock({**run.opened.checkpoint.config, **cutter.config_updates})
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=freed / sum(sizes),
        config_updates=cutter.config_updates,
        files={SCORES: scores_file(found, _origin(run.opened, method)), **files},
        warnings=[] if stock else [UNEQUAL],
    )


def groups_of(opened: Opened, method: StructureMethod) -> list[tuple[int, Units]]:
    """Block and units of every kind that the method removes. Raises `RecipeError` where there are none."""
    groups = [(block.index, units) for block in opened.anatomy.blocks for units in method.units(block)]
    if not groups:
        raise RecipeError(
            f"method {method.id!r} on {opened.anatomy.family!r}",
            "a model with channels or heads that one matrix collects",
            "prune single weights: wanda",
        )
    return groups


def _scores(run: Run, method: StructureMethod) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Scores (`3.ffn`) and mean inputs (`3.ffn.mean`), from one pass over the dense model unless they are
    given, or left by the run that was interrupted; and files of the method's own."""
    if run.recipe.scores is not None:
        return _given(run.opened, method, Path(run.recipe.scores)), {}
    prepared = run.remembered(lambda: _prepared(run, method), PREPARED)
    return run.remembered(lambda: _score(run, method, prepared)), method.files(prepared)


def _prepared(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    seed = run.recipe.seed
    weights = UnitWeights(run.opened, method, seed, run.device)
    return method.prepare(weights, generator_for(seed, method.id), run.progress)


def _score(run: Run, method: StructureMethod, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    driver, watch = run.driver(), BlockWatch() if method.spread == "sigmoid" else None
    blocks = driver.blocks(forward=bool(method.statistics or watch), outputs=watch is not None)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in blocks:
            found |= _score_block(run, method, opened, prepared)
            if watch:
                watch.next_block()
            across = method.coarse_scope == "mlp"
            opened.finish(across_ffn(watch, opened) if watch and across else watch)
            task.advance()
    if watch:
        changes = watch.changes(run.group)
        found[method.change] = changes[method.change.removesuffix(".mlp")]
    return found


def _origin(opened: Opened, method: StructureMethod) -> dict[str, str]:
    """The options that all methods share are about what is made of scores, as are some of its own."""
    return origin_of(opened, method, exclude=method.unscored.union(StructureMethod.model_fields))


def _given(opened: Opened, method: StructureMethod, path: Path) -> dict[str, Tensor]:
    """Scores of an earlier run, if they are of this model and method and hold what the options need."""
    found = read_scores(path, _origin(opened, method))
    if missing := [name for name in _needed(opened, method) if name not in found]:
        raise InputError(f"{path} has no {missing[0]}", "scores of a run with options like these", NO_SCORES)
    return found


def _needed(opened: Opened, method: StructureMethod) -> list[str]:
    """What a file of scores must hold for these options."""
    names = [f"{index}.{units.kind}" for index, units in groups_of(opened, method)]
    means = [f"{name}.mean" for name in names] if method.compensate == "bias" else []
    return [*names, *means, *([method.change] if method.spread == "sigmoid" else [])]


def _score_block(
    run: Run, method: StructureMethod, opened: OpenBlock, prepared: dict[str, Tensor]
) -> dict[str, Tensor]:
    needs = method.statistics
    sites = {units.writer.input for units in method.units(opened.block)}
    observed = opened.observe(needs, sites=sites, record_output=False) if needs else {}
    found: dict[str, Tensor] = {}
    problems = problems_of(opened.block, opened.parameters, method, run.recipe.seed, observed, prepared)
    for problem in problems:
        found[problem.name] = method.score(problem).float().cpu()
        inputs = problem.inputs
        if inputs.mean is not None:
            found[f"{problem.name}.mean"] = (inputs.mean / max(inputs.tokens, 1)).cpu()
    return found
