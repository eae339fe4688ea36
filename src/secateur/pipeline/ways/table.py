"""What each family of methods does with a model: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from secateur.core.errors import RecipeError
from secateur.core.method import METHODS, Method
from secateur.core.progress import Progress
from secateur.experts.base import ExpertMethod
from secateur.experts.precision import PrecisionMethod
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.decode_costs import DecodeTable
from secateur.pipeline.plans.sizes import FileSizes
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.ways.adaptive import adaptive_sizes, check_adaptive, prune_adaptive
from secateur.pipeline.ways.depth import check_depth, depth_sizes, prune_depth
from secateur.pipeline.ways.experts import check_experts, expert_sizes, experts_observe, prune_experts
from secateur.pipeline.ways.pieces import check_pieces, prune_pieces
from secateur.pipeline.ways.quantised import check_quantised, prune_quantised, quantised_observes
from secateur.pipeline.ways.search import check_search, prune_search
from secateur.pipeline.ways.slices import check_slices, prune_slices, slice_sizes
from secateur.pipeline.ways.structure import (
    check_structure,
    decode_table,
    prune_structure,
    structure_observes,
)
from secateur.pipeline.ways.weights import check_weights, prune_weights, weights_observe
from secateur.pipeline.ways.width import check_width, prune_width, width_sizes
from secateur.recipe import Recipe
from secateur.structure.base import (
    AdaptiveMethod,
    DepthMethod,
    PieceMethod,
    SearchMethod,
    SliceMethod,
    StructureMethod,
    WidthMethod,
)
from secateur.weights.base import WeightMethod

__all__ = [
    "checked_method",
    "measured_decode",
    "most_bytes",
    "observes",
    "planned_sizes",
    "prune_blocks_of",
]


class _Way(NamedTuple):
    """How methods of one base class run.

    Attributes:
        base: the class.
        check: `check(opened, method, recipe)` refuses, before a weight is read, what cannot be done.
        prune: `prune(run, method)` writes all blocks.
        observes: `observes(method, recipe)`: whether that looks at calibration text.
        sizes: `sizes(opened, method, recipe)`: of the files, where they are known or can be foretold.
        amounts: what may say how much goes in place of a sparsity: `budget`, `plan`.
    """

    base: type[Method]
    check: Callable[[Opened, Any, Recipe], None]
    prune: Callable[[Run, Any], Outcome]
    observes: Callable[[Any, Recipe], bool] = lambda method, recipe: True
    sizes: Callable[[Opened, Any, Recipe], FileSizes | None] = lambda opened, method, recipe: None
    amounts: tuple[str, ...] = ()


WAYS = (
    _Way(WeightMethod, check_weights, prune_weights, weights_observe),
    _Way(SearchMethod, check_search, prune_search),
    _Way(StructureMethod, check_structure, prune_structure, structure_observes, amounts=("budget", "plan")),
    _Way(AdaptiveMethod, check_adaptive, prune_adaptive, sizes=adaptive_sizes),
    _Way(DepthMethod, check_depth, prune_depth, sizes=depth_sizes),
    _Way(PieceMethod, check_pieces, prune_pieces),
    _Way(WidthMethod, check_width, prune_width, sizes=width_sizes),
    _Way(SliceMethod, check_slices, prune_slices, sizes=slice_sizes),
    _Way(ExpertMethod, check_experts, prune_experts, experts_observe, expert_sizes, amounts=("budget",)),
    _Way(PrecisionMethod, check_quantised, prune_quantised, quantised_observes),
)
"""The first whose base class a method has is its way."""


def checked_method(opened: Opened, recipe: Recipe) -> Method:
    """The method of the recipe, after everything that can be refused before a weight is read.

    Raises:
        InputError: what this method cannot do with this model.
    """
    method: Method = METHODS.get(recipe.method).from_options(recipe.options)
    way = _way(method)
    asked = "budget" if recipe.budget is not None else "plan"
    if getattr(recipe, asked) is not None and asked not in way.amounts:
        raise RecipeError(
            f"a {asked} with method {method.id!r}, which removes {method.removes}",
            "a method that removes heads and channels, such as flap",
            "give --sparsity instead",
        )
    way.check(opened, method, recipe)
    return method


def observes(method: Method, recipe: Recipe) -> bool:
    """Whether the run looks at calibration text at all."""
    return _way(method).observes(method, recipe)


def measured_decode(
    opened: Opened, method: Method, recipe: Recipe, progress: Progress, cache: Path | None
) -> DecodeTable | None:
    """Costs of a token on this machine where the budget is a time; `cache` may hold those of a run before.

    Raises:
        RecipeError: a budget out of reach, or a model too large to be timed here.
    """
    if not isinstance(method, StructureMethod):
        return None
    return decode_table(opened, method, recipe, progress, cache)


def planned_sizes(opened: Opened, method: Method, recipe: Recipe) -> FileSizes | None:
    """Of the files that a run will write; None where they depend on what it finds."""
    return _way(method).sizes(opened, method, recipe)


def most_bytes(opened: Opened, method: Method, recipe: Recipe) -> int:
    """What the tensors of the result have at most: as many as those of the model where it is not known."""
    found = planned_sizes(opened, method, recipe)
    return found.nbytes if found and found.exact else opened.checkpoint.dense_nbytes


def prune_blocks_of(run: Run) -> Outcome:
    """Write all blocks, by the way of the method's family."""
    return _way(run.method).prune(run, run.method)


def _way(method: Method) -> _Way:
    for way in WAYS:
        if isinstance(method, way.base):
            return way
    raise TypeError(f"no way to run methods of family {method.family!r}")
