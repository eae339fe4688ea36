"""Single weights to zero: block by block, each written before the next is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.anatomy.model import Matrix
from secateur.calibration.driver import Driver, OpenBlock
from secateur.calibration.gradients import GradientStore
from secateur.checkpoint.packing import DENSE, Packed
from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.core.errors import RecipeError
from secateur.core.factored import Factored
from secateur.pipeline.blocks import gradients_for, prune_blocks
from secateur.pipeline.budget import (
    budget_as_json,
    budget_from_json,
    check_pattern_fits,
    plan_budget,
    uniform_budget,
)
from secateur.pipeline.matrices import Budget
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Outcome, Run
from secateur.recipe import Recipe
from secateur.storage.armor import packed
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.base import WeightMethod

__all__ = ["check_weights", "prune_weights", "weights_observe"]


def check_weights(opened: Opened, method: WeightMethod, recipe: Recipe) -> None:
    """Refuse a pattern that this model or method cannot have, and factors that could not be stored.

    Raises `RecipeError`.
    """
    check_pattern_fits(opened.anatomy, method, recipe.parsed_pattern)
    if not method.leaves_zeros and recipe.format != DENSE:
        raise RecipeError(
            f"format {recipe.format!r} with method {method.id!r}, whose products have no zeros",
            "a method that leaves zeros",
            "leave out --format"
            + (
                ": the core is packed anyway"
                if method.stores_factors
                else ", or use -O store=factors in its place"
            ),
        )
    if not method.stores_factors:
        return
    for block in opened.anatomy.blocks:
        for matrix in block.matrices:
            if _own_tensor(opened, block.index, matrix) is None:
                raise RecipeError(
                    f"factors of {block.index}.{matrix.name}, which is not stored as a matrix of its own",
                    "matrices stored one by one as (outputs, inputs)",
                    "leave out -O store=factors: the product is written",
                )


def weights_observe(method: WeightMethod, recipe: Recipe) -> bool:
    """Whether the method or the allocation looks at calibration text."""
    allocation = ALLOCATIONS.get(recipe.allocation).from_options(recipe.allocation_options)
    return bool(method.statistics) or allocation.needs_pass == "activations"


def prune_weights(run: Run, method: WeightMethod) -> Outcome:
    """Prune every block; finished ones are only replayed."""
    done = run.finished()
    dense = run.driver()
    gradients = gradients_for(method, dense, run.scratch, run.progress, run.group)
    budget = _budget(run, method, dense, gradients)
    layers, blocks = prune_blocks(
        run.driver(read=run.written(set(done))),
        method,
        budget,
        gradients,
        run.recipe.seed,
        run.progress,
        finished=done,
        store=lambda block, factored: _store(run, block, factored, budget),
    )
    return Outcome.of_weights(layers, blocks, leaves_zeros=method.leaves_zeros)


def _store(
    run: Run, block: OpenBlock, factored: Mapping[str, Factored], budget: Budget
) -> Callable[[dict[str, Any]], None]:
    small: dict[str, Packed] = {}
    for matrix in block.block.matrices:
        name = _own_tensor(run.opened, block.index, matrix)
        if matrix.name in factored and name is not None:
            dtype = torch_dtype(run.opened.checkpoint.tensors[name].dtype)
            small[name] = packed(factored[matrix.name], dtype, budget.pattern)
            matrix.view(block.parameters).copy_(small[name].unpack())
    stored, _ = run.as_stored(block)
    return lambda record: run.keep(block.index, {**stored, **small}, record)


def _own_tensor(opened: Opened, index: int, matrix: Matrix) -> str | None:
    """The tensor on disk that is this very matrix; None where it is a part, several, or transposed."""
    pieces = opened.layout.pieces_of(index, matrix)
    whole = len(pieces) == 1 and tuple(pieces[0].shape) == matrix.shape and not matrix.transposed
    return pieces[0].name if whole else None


def _budget(run: Run, method: WeightMethod, dense: Driver, gradients: GradientStore | None) -> Budget:
    """The budget of the journal, or a new one, which the journal then keeps."""
    asked = run.recipe.parsed_pattern
    if asked.kind != "global" and run.recipe.allocation == "uniform":
        pattern = asked.resolve(method.default_pattern)
        return uniform_budget(run.opened.anatomy, pattern, run.recipe.resolved_sparsity)
    noted = run.writer.notes.get("budget") if run.writer else None
    if run.group:
        noted = run.group.broadcast(noted)
    if noted is not None:
        return budget_from_json(noted)
    budget = plan_budget(run.recipe, method, dense, gradients, run.scratch, run.progress)
    if run.writer:
        run.writer.note("budget", budget_as_json(budget))
    return budget
