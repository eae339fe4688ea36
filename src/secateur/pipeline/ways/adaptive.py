"""Whole units away in many small steps: look at the model as it is by now, take a few, look again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.core.errors import RecipeError
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.draft import Draft, groups_of
from secateur.pipeline.plans.result import Result
from secateur.pipeline.plans.sizes import FileSizes
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.ways.cutting import Choice, Cutter
from secateur.pipeline.ways.structure import outcome_of
from secateur.pipeline.ways.unit_gradients import unit_gradients, windows_of, without_units
from secateur.pipeline.ways.watching import Moves
from secateur.recipe import Recipe
from secateur.structure.allocation import Scored, require_reached, require_room
from secateur.structure.base import AdaptiveMethod
from secateur.structure.microsteps import Shrinking

__all__ = ["adaptive_sizes", "check_adaptive", "prune_adaptive"]

STEPS = "steps.safetensors"
HISTORY = "history.json"


def check_adaptive(opened: Opened, method: AdaptiveMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done, by taking all steps as if no block
    and no unit differed.

    Raises:
        RecipeError: scores of another run, a share that cannot be removed, or that whole heads do not make.
        AnatomyError: a family whose blocks cannot have the sizes.
    """
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}, which scores after every step anew",
            "a method that scores once, such as llm-pruner",
            "leave --scores out",
        )
    state = _begun(opened, method, recipe)
    total = opened.anatomy.block_parameters
    require_room(state.most, recipe.resolved_sparsity, total, method)
    _take_all(state, method)
    flat = [Scored(block, units, torch.zeros(units.count)) for block, units in state.groups]
    require_reached(flat, state.gone, recipe.resolved_sparsity, total, together=1)
    _ = Result.of(opened, state.groups, state.kept(), []).config_updates


def adaptive_sizes(opened: Opened, method: AdaptiveMethod, recipe: Recipe) -> FileSizes:
    """What a run that finds all units alike will write: near to what it finds otherwise."""
    state = _begun(opened, method, recipe)
    _take_all(state, method)
    result = Result.of(opened, state.groups, state.kept(), [])
    share = state.freed / opened.anatomy.block_parameters
    return FileSizes(share, result.parameters, result.nbytes, exact=False)


def _take_all(state: Shrinking, method: AdaptiveMethod) -> None:
    while blocks := state.open_blocks:
        unequal = {block: method.step * (1 + number / len(blocks)) for number, block in enumerate(blocks)}
        state.take(unequal, [torch.zeros(units.count) for _, units in state.groups])


def prune_adaptive(run: Run, method: AdaptiveMethod) -> Outcome:
    """Take steps until the budget is spent, then cut. A killed run goes on after its last step."""
    state, history = _steps(run, method)
    kept = state.kept()
    pairs = zip(state.groups, state.removed_at, strict=True)
    scored = [Scored(block, units, removed_at) for (block, units), removed_at in pairs]
    planned = Draft(run.opened, method, scored, kept, run.recipe.resolved_sparsity, None, None)
    choices = [Choice(group, None, stays) for group, stays in zip(scored, kept, strict=True)]
    layers, rows = Cutter(run, method, choices, planned).cut()
    files: dict[str, str | bytes] = {
        STEPS: save(_removed_at(state)),
        HISTORY: json.dumps(_history(run, state, history), indent=1) + "\n",
    }
    return outcome_of(run, planned, layers, rows, files)


def _begun(opened: Opened, method: AdaptiveMethod, recipe: Recipe) -> Shrinking:
    budget = recipe.resolved_sparsity * opened.anatomy.block_parameters
    return Shrinking(groups_of(opened, method), len(opened.anatomy.blocks), budget, method)


def _steps(run: Run, method: AdaptiveMethod) -> tuple[Shrinking, dict[str, Tensor]]:
    """All steps, and a row a step of `moves`, `increments` and `targets`, (steps, blocks), and `loss`."""
    state, history = _resumed(run, method)
    with run.progress.task(f"removing parameters with {method.id}", round(state.budget)) as task:
        task.advance(state.freed)
        while blocks := state.open_blocks:
            before_step = state.freed
            row = _step(run, method, state, blocks)
            for name, values in row.items():
                before = history.get(name, values.new_zeros(0, *values.shape))
                history[name] = torch.cat([before, values[None]])
            if run.writer:
                save_tensors(run.writer.workspace / STEPS, {**_removed_at(state), **history})
            share = state.freed / run.opened.anatomy.block_parameters
            note = f"sparsity {share:.3f}, loss {float(row['loss']):.3f}"
            task.advance(state.freed - before_step, note=note)
    return state, history


def _step(run: Run, method: AdaptiveMethod, state: Shrinking, blocks: list[int]) -> dict[str, Tensor]:
    """Look at the model as it is, and take a step."""
    moves = Moves(len(state.targets))
    driver = run.driver(_reader(run, state), windows_of(run, state.steps, method.step_windows))
    found = unit_gradients(driver, method, state.groups, run.scratch, run.progress, moves)
    scores = [method.rank(found.units[f"{block}.{units.kind}"]) for block, units in state.groups]
    means = moves.means(run.group)
    increments = torch.zeros_like(means)
    increments[blocks] = method.increments(means[blocks])
    state.take(dict(zip(blocks, increments[blocks].tolist(), strict=True)), scores)
    loss = torch.tensor(found.loss, dtype=torch.float64)
    return {"moves": means, "increments": increments, "targets": state.targets, "loss": loss}


def _reader(run: Run, state: Shrinking) -> Callable[[int], dict[str, Tensor] | None]:
    gone = [
        (block, units, removed_at.nonzero().squeeze(1))
        for (block, units), removed_at in zip(state.groups, state.removed_at, strict=True)
    ]
    return without_units(run.opened, gone)


def _resumed(run: Run, method: AdaptiveMethod) -> tuple[Shrinking, dict[str, Tensor]]:
    """Where the run that was interrupted stood, or the beginning."""
    state = _begun(run.opened, method, run.recipe)
    path = run.scratch / STEPS
    if not path.exists():
        return state, {}
    found = read_tensors(path, read_header(path).values())
    state.removed_at = [found.pop(f"{block}.{units.kind}") for block, units in state.groups]
    state.targets = found["targets"][-1].clone()
    state.steps = len(found["targets"])
    return state, found


def _removed_at(state: Shrinking) -> dict[str, Tensor]:
    """`3.ffn`: for every unit the step that took it, 0 for those that stay."""
    pairs = zip(state.groups, state.removed_at, strict=True)
    return {f"{block}.{units.kind}": removed_at for (block, units), removed_at in pairs}


def _history(run: Run, state: Shrinking, history: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row a step: what was measured before it, what was meant, and what was gone after it."""
    total, rows = run.opened.checkpoint.parameters, []
    for step in range(1, state.steps + 1):
        gone: dict[str, dict[int, float]] = {}
        freed = 0
        for (block, units), removed_at in zip(state.groups, state.removed_at, strict=True):
            count = int(((removed_at > 0) & (removed_at <= step)).sum())
            gone.setdefault(units.kind, {})[block] = count / units.count
            freed += count * units.parameters
        values = {name: tensor[step - 1].tolist() for name, tensor in history.items()}
        rows.append({"step": step, "parameters": total - freed, "removed": gone, **values})
    return rows
