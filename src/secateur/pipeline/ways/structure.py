"""Whole units away: score all blocks, choose once, then cut and write block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.units import Units
from secateur.calibration.driver import OpenBlock
from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import Progress
from secateur.core.statistics import BACKWARD, InputStatistics, Statistic
from secateur.pipeline.matrices import generator_for, statistics_of
from secateur.pipeline.opened import Opened, choose_device, choose_dtype
from secateur.pipeline.plans.decode_costs import DECODE, DecodeTable, measure_decode
from secateur.pipeline.plans.draft import Draft, draft, groups_of
from secateur.pipeline.plans.result import Result, new_biases
from secateur.pipeline.state import PLAN, PREPARED, SCORES, UNEQUAL, Outcome, Run
from secateur.pipeline.ways.cutting import Choice, Cutter
from secateur.pipeline.ways.unit_gradients import unit_gradients, windows_of, without_units
from secateur.pipeline.ways.unit_scores import NO_SCORES, origin_of, read_scores, scores_file
from secateur.pipeline.ways.unit_weights import UnitWeights, problems_of, shapes_of
from secateur.pipeline.ways.watching import BlockWatch, across_ffn
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer, Uniform
from secateur.report.structure import nearest_words
from secateur.structure.base import StructureMethod

__all__ = [
    "check_structure",
    "decode_table",
    "given_scores",
    "outcome_of",
    "prune_structure",
    "structure_observes",
]

GONE = -1.0
"""Below every score from gradients."""
Gone = Sequence[tuple[int, Units, Tensor]]


def check_structure(opened: Opened, method: StructureMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share or budget that cannot be met, or that whole heads do not make.
        AnatomyError: a family whose blocks cannot have the sizes.
        InputError: scores or a plan of another model or method.
    """
    if method.looks > 1 and recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r} in {method.looks} steps, which scores after every step anew",
            "one step",
            "leave --scores or -O steps= out",
        )
    target = recipe.target
    if target is not None and target.kind == "decode":  # its costs are measured later; try some cut
        groups = groups_of(opened, method)
        half = [torch.arange((units.count + 1) // 2) for _, units in groups]
        _ = Result.of(opened, groups, half, new_biases(opened, groups, method)).config_updates
    else:
        planned = draft(opened, method, recipe)
        _ = planned.result.config_updates
        for number in range(1, method.looks):
            draft(opened, method, _on_the_way(opened, method, recipe, planned, number))
    method.check(shapes_of(opened, groups_of(opened, method)))
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


def structure_observes(method: StructureMethod, recipe: Recipe) -> bool:
    """Whether scores, their spread, a bias or a refit look at calibration text."""
    if method.compensate == "least_squares" or recipe.plan is not None:
        return method.compensate != "none"
    return recipe.scores is None and (bool(method.statistics) or method.spread == "sigmoid")


def prune_structure(run: Run, method: StructureMethod) -> Outcome:
    """Score, choose, cut. Scores are kept beside the result, to plan other ratios from."""
    found, files = _scores(run, method)
    planned = draft(run.opened, method, run.recipe, None if run.recipe.plan else found, run.decode)
    choices = [
        Choice(group, found.get(f"{group.block}.{group.units.kind}.mean"), stays)
        for group, stays in zip(planned.scored, planned.kept, strict=True)
    ]
    cutter = Cutter(run, method, choices, planned)
    layers, rows = cutter.cut()
    if run.recipe.plan is None and method.looks == 1:
        files[SCORES] = scores_file(found, _origin(run.opened, method))
    return outcome_of(run, planned, layers, rows, files)


def outcome_of(
    run: Run, planned: Draft, layers: list[Layer], rows: list[Block], files: dict[str, str | bytes]
) -> Outcome:
    """What a plan became, with the plan as a file."""
    plan, facts = planned.stored(run.recipe, run.data.calibration.sha256), planned.facts()
    return Outcome(
        layers=layers,
        blocks=rows,
        sparsity=planned.freed / sum(block.size for block in run.opened.anatomy.blocks),
        requested=planned.sparsity,
        config_updates=planned.result.config_updates,
        files={PLAN: plan.dumps(), **files},
        warnings=[*_warnings(facts), *planned.notes()],
        structure=facts,
    )


def _warnings(facts: dict[str, Any]) -> list[str]:
    """How to load what no stock class can be, and what it would cost that one could."""
    nearest = [nearest_words(Uniform.model_validate(facts["uniform"]))] if facts["uniform"] else []
    return [] if facts["stock"] else [UNEQUAL, *nearest]


def _scores(run: Run, method: StructureMethod) -> tuple[dict[str, Tensor], dict[str, str | bytes]]:
    """Scores (`3.ffn`) and mean inputs (`3.ffn.mean`), from one pass over the dense model unless they are
    given, or left by the run that was interrupted; and files of the method's own."""
    if run.recipe.scores is not None:
        return given_scores(run.opened, method, Path(run.recipe.scores)), {}
    if run.recipe.plan is not None:
        return run.remembered(lambda: _means(run, method)) if method.compensate == "bias" else {}, {}
    prepared = run.remembered(lambda: _prepared(run, method), PREPARED)
    found = run.remembered(lambda: _score(run, method, prepared))
    return _looked_again(run, method, prepared, found), dict(method.files(prepared))


def _on_the_way(
    opened: Opened, method: StructureMethod, recipe: Recipe, planned: Draft, number: int
) -> Recipe:
    """What is asked for until round `number`: its part of all that shall go (llm-pruner, section 2.4)."""
    sparsity = planned.freed / opened.anatomy.block_parameters * number / method.looks
    return recipe.model_copy(update={"budget": None, "sparsity": sparsity})


def _looked_again(
    run: Run, method: StructureMethod, prepared: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Scores of the last round: what went in the rounds before has the lowest."""
    for number in range(1, method.looks):
        asked = _on_the_way(
            run.opened, method, run.recipe, draft(run.opened, method, run.recipe, found, run.decode), number
        )
        planned = draft(run.opened, method, asked, found)
        gone = [
            (group.block, group.units, group.units.others(stays))
            for group, stays in zip(planned.scored, planned.kept, strict=True)
        ]

        def find(number: int = number, gone: Gone = gone) -> dict[str, Tensor]:
            return _score(run, method, prepared, number, gone)

        found = {**found, **run.remembered(find, f"round-{number}.safetensors")}
        for block, units, removed in gone:
            found[f"{block}.{units.kind}"][removed] = GONE
    return found


def _prepared(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    seed = run.recipe.seed
    weights = UnitWeights(run.opened, groups_of(run.opened, method), seed, run.device)
    return method.prepare(weights, generator_for(seed, method.id), run.progress)


def _score(
    run: Run, method: StructureMethod, prepared: dict[str, Tensor], number: int = 0, gone: Gone = ()
) -> dict[str, Tensor]:
    """Of the model without what is `gone`, in round `number`."""
    found: dict[str, Tensor] = {}
    groups = groups_of(run.opened, method)
    read = without_units(run.opened, gone) if gone else None
    driver = run.driver(read, windows_of(run, number, method.windows_a_look))
    watch = BlockWatch() if method.spread == "sigmoid" and not gone else None
    gradients: Mapping[str, Mapping[Statistic, Tensor]] = {}
    if method.statistics & BACKWARD:
        gradients = unit_gradients(driver, method, groups, run.scratch, run.progress).units
    forward = bool(method.statistics - BACKWARD or watch)
    with run.progress.task(f"scoring with {method.id}", len(run.opened.anatomy.blocks)) as task:
        for opened in driver.blocks(forward=forward, outputs=watch is not None):
            kinds = [units for index, units in groups if index == opened.index]
            found |= _score_block(run, method, opened, kinds, gradients, prepared)
            if watch:
                watch.next_block()
            across = method.coarse_scope == "mlp"
            opened.finish(across_ffn(watch, opened) if watch and across else watch)
            task.advance()
    if watch:
        changes = watch.changes(run.group)
        found[method.change] = changes[method.change.removesuffix(".mlp")]
    return found


def _means(run: Run, method: StructureMethod) -> dict[str, Tensor]:
    """Mean inputs alone: biases are made of them, and a plan does not hold them."""
    found: dict[str, Tensor] = {}
    groups = groups_of(run.opened, method)
    with run.progress.task("observing what goes", len(run.opened.anatomy.blocks)) as task:
        for opened in run.driver().blocks(outputs=False):
            kinds = [units for index, units in groups if index == opened.index]
            sites = {units.writer.input for units in kinds}
            observed = opened.observe({"mean"}, sites=sites, record_output=False) if kinds else {}
            for units in kinds:
                found[f"{opened.index}.{units.kind}.mean"] = _mean(statistics_of(units.writer, observed))
            opened.finish()
            task.advance()
    return found


def _mean(inputs: InputStatistics) -> Tensor:
    assert inputs.mean is not None
    return (inputs.mean / max(inputs.tokens, 1)).cpu()


def _origin(opened: Opened, method: StructureMethod) -> dict[str, str]:
    """The options that all methods share are about what is made of scores, as are some of its own."""
    return origin_of(opened, method, exclude=method.unscored.union(StructureMethod.model_fields))


def given_scores(opened: Opened, method: StructureMethod, path: Path) -> dict[str, Tensor]:
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
    run: Run,
    method: StructureMethod,
    opened: OpenBlock,
    kinds: Sequence[Units],
    gradients: Mapping[str, Mapping[Statistic, Tensor]],
    prepared: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    needs = method.statistics - BACKWARD
    sites = {units.writer.input for units in kinds}
    observed = opened.observe(needs, sites=sites, record_output=False) if needs and kinds else {}
    found: dict[str, Tensor] = {}
    for problem in problems_of(opened.block, opened.parameters, kinds, run.recipe.seed, observed):
        problem.prepared, problem.taylor = prepared, gradients.get(problem.name, {})
        found[problem.name] = method.score(problem).float().cpu()
        inputs = problem.inputs
        if inputs.mean is not None:
            found[f"{problem.name}.mean"] = _mean(inputs)
    return found
