"""Whole units away: score all blocks, choose once, then cut and write block by block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.anatomy.resized import is_stock
from secateur.calibration.driver import OpenBlock
from secateur.core.errors import InputError
from secateur.core.statistics import BACKWARD, Statistic
from secateur.pipeline.cutting import UNEQUAL, Choice, Cutter, groups_of, require_sizes
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import SCORES, Outcome, Run
from secateur.pipeline.unit_gradients import unit_gradients
from secateur.pipeline.watching import BlockWatch
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored, allocate
from secateur.structure.base import StructureMethod, UnitProblem
from secateur.structure.units import Units, producers

__all__ = ["check_structure", "prune_structure"]


def check_structure(opened: Opened, method: StructureMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share that cannot be removed, or that whole heads do not make.
        AnatomyError: a family whose blocks cannot have the sizes.
        InputError: scores of another model or method.
    """
    groups = groups_of(opened, method)
    flat = [Scored(index, units, torch.zeros(units.count)) for index, units in groups]
    blocks = opened.anatomy.blocks
    sizes = [block.size for block in blocks]
    kept = allocate(flat, sizes, recipe.resolved_sparsity, method, torch.zeros(len(blocks)))
    require_sizes(opened, groups, kept)
    if recipe.scores is not None:
        _given(opened, method, Path(recipe.scores))


def prune_structure(run: Run, method: StructureMethod) -> Outcome:
    """Score, choose, cut. Scores are kept beside the result, to plan other ratios from."""
    blocks = run.opened.anatomy.blocks
    found = _scores(run, method)
    scored = [
        Scored(index, units, found[f"{index}.{units.kind}"]) for index, units in groups_of(run.opened, method)
    ]
    sizes = [block.size for block in blocks]
    kept = allocate(scored, sizes, run.recipe.resolved_sparsity, method, found.get("turns"))
    choices = [
        Choice(group, found.get(f"{group.block}.{group.units.kind}.mean"), stays)
        for group, stays in zip(scored, kept, strict=True)
    ]
    cutter = Cutter(run, method, choices)
    layers, rows = cutter.cut()
    freed = sum(len(choice.removed) * choice.units.parameters for choice in choices)
    stock = is_stock({**run.opened.checkpoint.config, **cutter.config_updates})
    origin = {"origin": json.dumps(_origin(run.opened, method))}  # one key: several come in any order
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=freed / sum(sizes),
        config_updates=cutter.config_updates,
        files={SCORES: save({name: tensor.contiguous() for name, tensor in found.items()}, origin)},
        warnings=[] if stock else [UNEQUAL],
    )


def _scores(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    """Scores (`3.ffn`) and mean inputs (`3.ffn.mean`), from one pass over the dense model unless they are
    given, or left by the run that was interrupted."""
    if run.recipe.scores is not None:
        return _given(run.opened, method, Path(run.recipe.scores))
    return run.remembered(lambda: _score(run, method))


def _score(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    groups = groups_of(run.opened, method)
    driver, watch = run.driver(), BlockWatch() if method.spread == "sigmoid" else None
    gradients: Mapping[str, Mapping[Statistic, Tensor]] = {}
    if method.statistics & BACKWARD:
        gradients = unit_gradients(driver, method, groups, run.scratch, run.progress).units
    forward = bool(method.statistics - BACKWARD or watch)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in driver.blocks(forward=forward, outputs=watch is not None):
            kinds = [units for index, units in groups if index == opened.index]
            found |= _score_block(run, method, opened, kinds, gradients)
            if watch:
                watch.next_block()
            opened.finish(watch)
            task.advance()
    if watch:
        found["turns"] = watch.states(run.group)["turns"]
    return found


def _origin(opened: Opened, method: StructureMethod) -> dict[str, str]:
    """What scores hold for: the options that all methods share are about what is made of them."""
    settings = method.model_dump_json(exclude=set(StructureMethod.model_fields))
    return {"model": opened.checkpoint.fingerprint(), "method": method.id, "options": settings}


def _given(opened: Opened, method: StructureMethod, path: Path) -> dict[str, Tensor]:
    """Scores of an earlier run, if they are of this model and method and hold what the options need."""
    remedy = "leave --scores out to score this model"
    try:
        with safe_open(path, "pt") as file:
            origin = json.loads((file.metadata() or {}).get("origin", "{}"))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = f"{path} is no file of scores ({error})"
        raise InputError(reason, "scores.safetensors of a run", remedy) from error
    for key, expected in _origin(opened, method).items():
        if origin.get(key) != expected:
            raise InputError(f"{path} holds scores of {key} {origin.get(key)}", f"{key} {expected}", remedy)
    if missing := [name for name in _needed(opened, method) if name not in found]:
        raise InputError(f"{path} has no {missing[0]}", "scores of a run with options like these", remedy)
    return found


def _needed(opened: Opened, method: StructureMethod) -> list[str]:
    """What a file of scores must hold for these options."""
    names = [f"{index}.{units.kind}" for index, units in groups_of(opened, method)]
    means = [f"{name}.mean" for name in names] if method.compensate == "bias" else []
    return [*names, *means, *(["turns"] if method.spread == "sigmoid" else [])]


def _score_block(
    run: Run,
    method: StructureMethod,
    opened: OpenBlock,
    kinds: Sequence[Units],
    gradients: Mapping[str, Mapping[Statistic, Tensor]],
) -> dict[str, Tensor]:
    needs = method.statistics - BACKWARD
    sites = {units.writer.input for units in kinds}
    observed = opened.observe(needs, sites=sites, record_output=False) if needs and kinds else {}
    found: dict[str, Tensor] = {}
    for units in kinds:
        name = f"{opened.index}.{units.kind}"
        inputs = statistics_of(units.writer, observed)
        problem = UnitProblem(
            name,
            units,
            units.writer.view(opened.parameters).float(),
            inputs,
            generator_for(run.recipe.seed, name),
            producers(opened.block, opened.parameters, units),
            gradients.get(name, {}),
        )
        found[name] = method.score(problem).float().cpu()
        if inputs.mean is not None:
            found[f"{name}.mean"] = (inputs.mean / max(inputs.tokens, 1)).cpu()
    return found
