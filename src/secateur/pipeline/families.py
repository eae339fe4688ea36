"""What each family of methods does with a model: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from secateur.core.method import METHODS, Method
from secateur.pipeline.depth_run import check_depth, prune_depth
from secateur.pipeline.opened import Opened
from secateur.pipeline.slice_run import check_slices, prune_slices
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.structure_run import check_structure, prune_structure
from secateur.pipeline.weights_run import check_weights, prune_weights
from secateur.pipeline.width_run import check_width, prune_width
from secateur.recipe import Recipe
from secateur.structure.base import DepthMethod, SliceMethod, StructureMethod, WidthMethod
from secateur.weights.base import WeightMethod

__all__ = ["checked_method", "prune_blocks_of"]


class _Way(NamedTuple):
    """How methods of one base class run.

    Attributes:
        base: the class.
        check: `check(opened, method, recipe)` refuses, before a weight is read, what cannot be done.
        prune: `prune(run, method)` writes all blocks.
    """

    base: type[Method]
    check: Callable[[Opened, Any, Recipe], None]
    prune: Callable[[Run, Any], Outcome]


WAYS = (
    _Way(WeightMethod, check_weights, prune_weights),
    _Way(StructureMethod, check_structure, prune_structure),
    _Way(DepthMethod, check_depth, prune_depth),
    _Way(WidthMethod, check_width, prune_width),
    _Way(SliceMethod, check_slices, prune_slices),
)
"""The first whose base class a method has is its way."""


def checked_method(opened: Opened, recipe: Recipe) -> Method:
    """The method of the recipe, after everything that can be refused before a weight is read.

    Raises:
        InputError: what this method cannot do with this model.
    """
    method: Method = METHODS.get(recipe.method).from_options(recipe.options)
    _way(method).check(opened, method, recipe)
    return method


def prune_blocks_of(run: Run) -> Outcome:
    """Write all blocks, by the way of the method's family."""
    return _way(run.method).prune(run, run.method)


def _way(method: Method) -> _Way:
    for way in WAYS:
        if isinstance(method, way.base):
            return way
    raise TypeError(f"no way to run methods of family {method.family!r}")
