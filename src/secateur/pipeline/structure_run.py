"""Whole units away: score all blocks, choose once, then cut and write block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.calibration.driver import OpenBlock
from secateur.core.errors import InputError
from secateur.core.progress import Progress
from secateur.core.statistics import InputStatistics
from secateur.pipeline.cutting import Choice, Cutter
from secateur.pipeline.decode_costs import DECODE, DecodeTable, measure_decode
from secateur.pipeline.draft import draft, groups_of
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.opened import Opened, choose_device, choose_dtype
from secateur.pipeline.result import Result, new_biases
from secateur.pipeline.state import PLAN, SCORES, Outcome, Run
from secateur.pipeline.watching import BlockWatch
from secateur.recipe import Recipe
from secateur.report.model import Uniform
from secateur.report.structure import nearest_words
from secateur.structure.base import StructureMethod, UnitProblem
from secateur.structure.units import producers

__all__ = ["check_structure", "decode_table", "given_scores", "prune_structure"]

UNEQUAL = (
    "Blocks differ in size, or have biases that the stock class lacks: load it after `import secateur`, or "
    "with trust_remote_code=True."
)


def check_structure(opened: Opened, method: StructureMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share or budget that cannot be met, or that whole heads do not make.
        AnatomyError: a family whose blocks cannot have the sizes.
        InputError: scores or a plan of another model or method.
    """
    target = recipe.target
    if target is not None and target.kind == "decode":  # its costs are measured later; try some cut
        groups = groups_of(opened, method)
        half = [torch.arange((units.count + 1) // 2) for _, units in groups]
        _ = Result.of(opened, groups, half, new_biases(opened, groups, method)).config_updates
    else:
        _ = draft(opened, method, recipe).result.config_updates
    if recipe.scores is not None:
        given_scores(opened, method, Path(recipe.scores))


def decode_table(
    opened: Opened, method: StructureMethod, recipe: Recipe, progress: Progress, cache: Path | None
) -> DecodeTable | None:
    """What a token costs on this machine, if the budget asks: measured, or as the run before measured it.

    Raises:
        RecipeError: a budget that is out of reach, or a model too large to be timed.
    """
    target = recipe.target
    if target is None or target.kind != "decode":
        return None
    if cache and (cache / DECODE).exists():
        return DecodeTable.load(cache / DECODE)
    groups, device = groups_of(opened, method), choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, opened.stored_dtype)
    biases = new_biases(opened, groups, method)
    table = measure_decode(opened, method, groups, biases, device, dtype, progress)
    draft(opened, method, recipe, decode=table)
    return table


def prune_structure(run: Run, method: StructureMethod) -> Outcome:
    """Score, choose, cut. Scores are kept beside the result, to plan other ratios from."""
    found = _scores(run, method)
    planned = draft(run.opened, method, run.recipe, None if run.recipe.plan else found, run.decode)
    choices = [
        Choice(group, found.get(f"{group.block}.{group.units.kind}.mean"), stays)
        for group, stays in zip(planned.scored, planned.kept, strict=True)
    ]
    cutter = Cutter(run, method, choices, planned)
    layers, rows = cutter.cut()
    origin = {"origin": json.dumps(_origin(run.opened, method))}  # one key: several come in any order
    scores = save({name: tensor.contiguous() for name, tensor in found.items()}, origin)
    plan = planned.stored(run.recipe, run.data.calibration.sha256)
    facts = planned.facts()
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=planned.freed / sum(block.size for block in run.opened.anatomy.blocks),
        requested=planned.sparsity,
        config_updates=planned.result.config_updates,
        files={PLAN: plan.dumps(), **({} if run.recipe.plan else {SCORES: scores})},
        warnings=_warnings(facts),
        structure=facts,
    )


def _warnings(facts: dict[str, Any]) -> list[str]:
    """How to load what no stock class can be, and what it would cost that one could."""
    nearest = [nearest_words(Uniform.model_validate(facts["uniform"]))] if facts["uniform"] else []
    return [] if facts["stock"] else [UNEQUAL, *nearest]


def _scores(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    """Scores (`3.ffn`) and mean inputs (`3.ffn.mean`), from one pass over the dense model unless they are
    given, or left by the run that was interrupted."""
    if run.recipe.scores is not None:
        return given_scores(run.opened, method, Path(run.recipe.scores))
    if run.recipe.plan is not None:
        return run.remembered(lambda: _means(run, method)) if method.compensate == "bias" else {}
    return run.remembered(lambda: _score(run, method))


def _score(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    driver, watch = run.driver(), BlockWatch() if method.spread == "sigmoid" else None
    blocks = driver.blocks(forward=bool(method.statistics or watch), outputs=watch is not None)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in blocks:
            found |= _score_block(run, method, opened)
            if watch:
                watch.next_block()
            opened.finish(watch)
            task.advance()
    if watch:
        found["turns"] = watch.states(run.group)["turns"]
    return found


def _means(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    """Mean inputs alone: biases are made of them, and a plan does not hold them."""
    found: dict[str, Tensor] = {}
    with run.progress.task("observing what goes", len(run.opened.anatomy.blocks)) as task:
        for opened in run.driver().blocks(outputs=False):
            kinds = method.units(opened.block)
            sites = {units.writer.input for units in kinds}
            observed = opened.observe({"mean"}, sites=sites, record_output=False)
            for units in kinds:
                found[f"{opened.index}.{units.kind}.mean"] = _mean(statistics_of(units.writer, observed))
            opened.finish()
            task.advance()
    return found


def _mean(inputs: InputStatistics) -> Tensor:
    assert inputs.mean is not None
    return (inputs.mean / max(inputs.tokens, 1)).cpu()


def _origin(opened: Opened, method: StructureMethod) -> dict[str, str]:
    """What scores hold for: the options that all methods share are about what is made of them."""
    settings = method.model_dump_json(exclude=set(StructureMethod.model_fields))
    return {"model": opened.checkpoint.fingerprint(), "method": method.id, "options": settings}


def given_scores(opened: Opened, method: StructureMethod, path: Path) -> dict[str, Tensor]:
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


def _score_block(run: Run, method: StructureMethod, opened: OpenBlock) -> dict[str, Tensor]:
    needs, kinds = method.statistics, method.units(opened.block)
    sites = {units.writer.input for units in kinds}
    observed = opened.observe(needs, sites=sites, record_output=False) if needs else {}
    found: dict[str, Tensor] = {}
    for units in kinds:
        name = f"{opened.index}.{units.kind}"
        inputs = statistics_of(units.writer, observed)
        weight = units.writer.view(opened.parameters).float()
        problem = UnitProblem(
            name,
            units,
            weight,
            inputs,
            generator_for(run.recipe.seed, name),
            producers(opened.block, opened.parameters, units),
        )
        found[name] = method.score(problem).float().cpu()
        if inputs.mean is not None:
            found[f"{name}.mean"] = _mean(inputs)
    return found
