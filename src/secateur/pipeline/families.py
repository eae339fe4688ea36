"""What each family of methods does with a model: the one place that knows them all."""

from __future__ import annotations

from secateur.core.method import METHODS, Method
from secateur.pipeline.budget import check_pattern_fits
from secateur.pipeline.depth_run import check_depth, prune_depth
from secateur.pipeline.opened import Opened
from secateur.pipeline.state import Outcome, Run
from secateur.pipeline.structure_run import check_structure, prune_structure
from secateur.pipeline.weights_run import prune_weights
from secateur.recipe import Recipe
from secateur.structure.base import DepthMethod, StructureMethod
from secateur.weights.base import WeightMethod

__all__ = ["checked_method", "prune_blocks_of"]


def checked_method(opened: Opened, recipe: Recipe) -> Method:
    """The method of the recipe, after everything that can be refused before a weight is read.

    Raises:
        InputError: what this method cannot do with this model.
    """
    method: Method = METHODS.get(recipe.method).from_options(recipe.options)
    if isinstance(method, WeightMethod):
        check_pattern_fits(opened.anatomy, method, recipe.parsed_pattern)
    elif isinstance(method, StructureMethod):
        check_structure(opened, method, recipe)
    elif isinstance(method, DepthMethod):
        check_depth(opened, method, recipe)
    return method


def prune_blocks_of(run: Run) -> Outcome:
    """Write all blocks, by the way of the method's family."""
    method = run.method
    if isinstance(method, WeightMethod):
        return prune_weights(run, method)
    if isinstance(method, StructureMethod):
        return prune_structure(run, method)
    if isinstance(method, DepthMethod):
        return prune_depth(run, method)
    raise TypeError(f"no way to run methods of family {method.family!r}")
